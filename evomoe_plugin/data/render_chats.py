"""The process that renders a chat template, which anybody may have written.

It runs as a script and imports nothing of this package. Each line of its input and output is a JSON
value: first the template, its variables, the marks, and CPU seconds for each list of chats; then
such lists, each with an answer.
"""

import contextlib
import json
import math
import resource
import sys
import time

from jinja2 import TemplateError, nodes
from jinja2.ext import Extension
from jinja2.sandbox import ImmutableSandboxedEnvironment

MEMORY_BYTES, MAX_CHARS = 1 << 30, 1 << 23
# It writes no file. CPU time is limited for each line.
LIMITS = {
    resource.RLIMIT_AS: MEMORY_BYTES,
    resource.RLIMIT_FSIZE: 0,
    resource.RLIMIT_CORE: 0,
}


class Generation(Extension):
    """`{% generation %}`, with which some templates enclose responses: puts marks around them."""

    tags = {"generation"}
    marks = ("", "")

    def parse(self, parser):
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_marked"), [], [], body, lineno=line)

    def _marked(self, caller):
        before, after = self.marks
        return before + caller() + after


def raise_exception(message):
    """Templates call it to refuse a chat."""
    raise TemplateError(message)


def to_json(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
    """As in transformers: jinja's own filter escapes HTML."""
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def environment():
    """What transformers' `apply_chat_template` gives a template, without the clock."""
    made = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, "jinja2.ext.loopcontrols"]
    )
    made.filters["tojson"] = to_json
    made.globals["raise_exception"] = raise_exception
    return made


def limit_cpu(seconds):
    """Give this process so much more CPU time."""
    used = math.ceil(time.process_time())
    resource.setrlimit(resource.RLIMIT_CPU, (used + seconds, resource.RLIM_INFINITY))


def render(template, **variables):
    """The text of a chat."""
    parts, size = [], 0
    for part in template.generate(**variables):
        parts.append(part)
        size += len(part)
        if size > MAX_CHARS:
            raise TemplateError(f"gives more than {MAX_CHARS:,} characters")
    return "".join(parts)


def reason(error):
    """One line on why a template failed."""
    if isinstance(error, MemoryError):
        return f"needs more than {MEMORY_BYTES >> 20:,} MiB of memory"
    line = f" (line {error.lineno})" if getattr(error, "lineno", None) else ""
    text = " ".join(str(getattr(error, "message", None) or error).split())
    return f"{type(error).__name__}{line}: {text[:200]}"


def main():
    setup = json.loads(sys.stdin.readline())
    made, template = environment(), None
    made.extensions[f"{Generation.__module__}.Generation"].marks = setup["marks"]
    for which, limit in LIMITS.items():
        with contextlib.suppress(ValueError):  # macOS does not limit memory
            resource.setrlimit(which, (limit, limit))
    for line in sys.stdin:
        limit_cpu(setup["cpu_seconds"])
        try:
            template = template or made.from_string(setup["template"])
            answer = {
                "texts": [
                    render(
                        template,
                        messages=messages,
                        add_generation_prompt=prompts,
                        tools=None,
                        documents=None,
                        **setup["variables"],
                    )
                    for messages, prompts in json.loads(line)
                ]
            }
        except Exception as error:
            answer = {"error": reason(error)}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
