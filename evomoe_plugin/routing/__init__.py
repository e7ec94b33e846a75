"""Pure tensor functions of routing: the plan, schedules, noise, losses and statistics."""
