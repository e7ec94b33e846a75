#!/usr/bin/env bash
# From a dense Qwen2 to a Qwen2-MoE of transformers, on a CPU in a few minutes:
#   examples/qwen2_to_moe/run.sh [FOLDER]
# FOLDER (default: qwen2-to-moe-run) must not exist. UPDATES=150 sets the length of training,
# TEXT a folder of .py files (Python's own email package), DENSE a Qwen2 of your own instead of the
# tiny one.
set -euo pipefail
cd "$(dirname "$0")/../.."
here=examples/qwen2_to_moe
run=${1:-qwen2-to-moe-run}
updates=${UPDATES:-150}
folder_of() { python -c "import $1, os; print(os.path.dirname($1.__file__))"; }
text=${TEXT:-$(folder_of email)}
dense=${DENSE:-$run/qwen2}
[ ! -e "$run" ] || { echo "error: $run exists already: give another folder" >&2; exit 2; }
mkdir -p "$run"
# More threads than one wait for each other in a model as tiny as this.
[ -n "${DENSE:-}" ] || export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}

step() { printf '\n── %s\n' "$*"; "$@"; }

# 1. A dense model and its tokenizer, of another text; the data, with the model's own token ids.
[ -n "${DENSE:-}" ] || step python $here/make_qwen2.py "$dense" "$(folder_of asyncio)"
step evomoe prepare "$text" --text-suffix .py --tokenizer "$dense" --out "$run/data" --workers 1

# 2. Upcycle: every 2nd FFN becomes 4 experts, of which a token is routed to 2, and a shared one
#    behind a gate of its own, as in Qwen2-MoE. The copies would compute the same twice: `noise`
#    makes them differ.
step evomoe upcycle "$dense" "$run/moe.pt" --method noise --data "$run/data" \
  --moe-gate top_k --moe-top-k 2 --moe-top-k-weights renormalized --moe-freq 2 --moe-expert-count 4 \
  --moe-shared-experts 1 --moe-shared-combine sigmoid

# 3. Train on.
step fairseq-train "$run/data" --user-dir evomoe_plugin --task language_modeling \
  --finetune-from-model "$run/moe.pt" --arch causal_lm_moe --hf-config "$dense" \
  --moe-gate top_k --moe-top-k 2 --moe-top-k-weights renormalized --moe-freq 2 --moe-expert-count 4 \
  --moe-shared-experts 1 --moe-shared-combine sigmoid \
  --criterion moe_cross_entropy --moe-gate-loss-wt 1 --moe-aux balance=0.01 \
  --optimizer adam --lr 0.001 --lr-scheduler inverse_sqrt --warmup-updates 30 --clip-norm 1.0 \
  --tokens-per-sample 128 --batch-size 16 --max-update "$updates" --save-dir "$run/checkpoints" \
  --best-checkpoint-metric ppl --validate-interval-updates 100 --log-interval 50 --log-format simple

# 4. Evaluate.
best=$run/checkpoints/checkpoint_best.pt
step fairseq-eval-lm "$run/data" --user-dir evomoe_plugin --path "$best" \
  --gen-subset test --tokens-per-sample 128 --batch-size 16

# 5. Export: a Qwen2MoeForCausalLM, and load it without this package.
step evomoe export "$best" "$run/exported" --format qwen2_moe
step python $here/load.py "$run/exported" "$(find "$text" -name '*.py' -size +4k -print -quit)"
