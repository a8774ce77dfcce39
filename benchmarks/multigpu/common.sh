# Sourced by the scripts beside it.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
export NCCL_NVLS_ENABLE=0
W=${1:-$(python3 -c 'import torch; print(max(2, torch.cuda.device_count()))')}
MODEL=src/isomoe/models/configs/qwen3-30b-a3b.json
read -r -a MORE <<<"${ISOMOE_ARGS:-}"
isomoe() { python3 -m isomoe.cli.main "$@"; }
