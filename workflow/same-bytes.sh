#!/usr/bin/env bash
# Does a study end in the same bytes in one process, as jobs of this machine, and as jobs of a Slurm cluster? `make jobs` calls this.
# The cluster is one node on this machine; where it can't be set up, that part is skipped with its reason.
set -euo pipefail
cd "$(dirname "$0")/.."
export SAE_STABILITY_SNAKEMAKE="$PWD/.venv-jobs/bin/snakemake" OMP_WAIT_POLICY=passive
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"; pkill -x slurmd || true; pkill -x slurmctld || true' EXIT

# Words at random: a text of a second, so that starting processes is most of the work.
.venv/bin/python - "$scratch/words.txt" <<'P'
import random, sys
words, draw = "the array of each axis is a float or an integer and it returns the sum over all values in the given shape".split(), random.Random(0)
open(sys.argv[1], "w").write("\n\n".join(" ".join(draw.choices(words, k=60)) for _ in range(400)))
P
study=(quick "--set=grid={variant: [gated]}" "--set=corpus=$scratch/words.txt" --set=tokens=4000 --set=evaluation_tokens=1000 --set=loss_tokens=500
  --set=ablation_tokens=200 --set=batch=64 --set=d_sae=48 --set=k=4 --set=dead_after=1000 "--set=experiments=[stability, function, triggers]"
  --name=same-bytes)

compute() {  # compute NAME OPTIONS...: the study into a store of its own, and the checksums of what it found
  local name=$1 started=$SECONDS
  shift
  SAE_STABILITY_RESULTS="$scratch/$name" .venv/bin/sae-stability run "${study[@]}" "$@" > "$scratch/$name.log" 2>&1 ||
    { tail -n 20 "$scratch/$name.log"; exit 1; }
  # saes.parquet holds the seconds of training
  (cd "$scratch/$name/same-bytes" && sha256sum claims.json $(ls tables/*.parquet | grep -v saes.parquet)) > "$scratch/$name.sums"
  echo "$name: $((SECONDS - started)) s"
}

slurm() {  # a cluster of one node, without accounting
  [ "$(id -u)" = 0 ] || { echo "not root"; return 1; }
  command -v slurmctld > /dev/null || { apt-get update -qq && apt-get install -y -qq slurm-wlm munge; } > /dev/null 2>&1 || { echo "no package slurm-wlm"; return 1; }
  mkdir -p /etc/slurm /var/spool/slurmctld /var/spool/slurmd /run/munge
  [ -f /etc/munge/munge.key ] || head -c 1024 /dev/urandom > /etc/munge/munge.key
  chown -R munge: /etc/munge /run/munge && chmod 400 /etc/munge/munge.key && chmod 755 /run/munge
  pgrep -x munged > /dev/null || su -s /bin/sh munge -c /usr/sbin/munged
  cat > /etc/slurm/slurm.conf <<C
ClusterName=one
SlurmctldHost=localhost
SlurmUser=root
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
JobAcctGatherType=jobacct_gather/none
SlurmdSpoolDir=/var/spool/slurmd
StateSaveLocation=/var/spool/slurmctld
ReturnToService=2
NodeName=localhost $(slurmd -C | grep -o 'CPUs=[0-9]*') RealMemory=$(($(free -m | awk '/^Mem/ {print $2}') - 500)) State=UNKNOWN
PartitionName=main Nodes=ALL Default=YES State=UP OverSubscribe=FORCE:2
C
  slurmctld -c && slurmd -N localhost && sleep 5 && timeout 30 srun -N1 true || { echo "the cluster does not start"; return 1; }
}

compute "one process"
compute "two jobs at a time" --jobs 2
compared=("two jobs at a time")
if reason=$(slurm); then
  compute "slurm" --profile workflow/profiles/one-node
  compared+=(slurm)
else
  echo "slurm: skipped, $reason"
fi
for name in "${compared[@]}"; do
  diff "$scratch/one process.sums" "$scratch/$name.sums" || { echo "$name: other bytes than in one process"; exit 1; }
  jobs=$(python3 -c 'import json, sys; print(len(json.load(open(sys.argv[1]))["jobs"]))' "$scratch/$name/same-bytes/workflow/plan.json")
  echo "$name: $jobs jobs, the bytes of one process in $(wc -l < "$scratch/$name.sums") files"
done
