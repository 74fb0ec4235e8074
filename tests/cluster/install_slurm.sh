#!/bin/sh
# For `make test-cluster`: sees to it that Slurm's programs are here, or says in one line why they cannot be.
PATH=$PATH:/usr/sbin
there() { command -v slurmctld && command -v slurmd && command -v munged && command -v srun; }
there >/dev/null && exit 0
if [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then
    echo "make test-cluster: there is no Slurm here; as root: apt-get install --no-install-recommends slurm-wlm munge" >&2
    exit 1
fi
apt-get update -q && DEBIAN_FRONTEND=noninteractive apt-get install -q -y --no-install-recommends slurm-wlm munge
