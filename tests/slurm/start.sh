#!/usr/bin/env bash
# start.sh start DIR | stop DIR: a Slurm of one machine from Debian's slurm-wlm and munge, as root, with all of its
# files in DIR, on this machine alone. `kill -9` of its slurmd and `restart DIR` of it are what tests/soak/slurm.py does.
set -euo pipefail
dir=$(realpath -m "$2") host=$(hostname -s)
export SLURM_CONF=$dir/slurm.conf
case $1 in
start)
    mkdir -p "$dir"/{state,spool} /run/munge
    grep -qw "$host" /etc/hosts || echo "127.0.0.1 $host" >>/etc/hosts
    cat >"$SLURM_CONF" <<CONF
ClusterName=local
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=26817
SlurmdPort=26818
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=cred_expire=10
StateSaveLocation=$dir/state
SlurmdSpoolDir=$dir/spool
SlurmctldPidFile=$dir/slurmctld.pid
SlurmdPidFile=$dir/slurmd.pid
SlurmctldLogFile=$dir/slurmctld.log
SlurmdLogFile=$dir/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerParameters=batch_sched_delay=1,sched_interval=2
KillWait=15
ReturnToService=2
SlurmdTimeout=60
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
NodeName=$host NodeAddr=127.0.0.1 CPUs=$(nproc --all) RealMemory=2000 State=UNKNOWN
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP
CONF
    if [ ! -s /etc/munge/munge.key ]; then
        install -d -o munge -m 700 /etc/munge
        head -c 1024 /dev/urandom >/etc/munge/munge.key
    fi
    chown munge /etc/munge/munge.key /run/munge
    chmod 400 /etc/munge/munge.key
    pgrep -x munged >/dev/null || su munge -s /bin/sh -c "/usr/sbin/munged --force"
    slurmctld
    slurmd
    for _ in $(seq 80); do
        sinfo --noheader 2>/dev/null | grep -q idle && exit 0
        sleep .25
    done
    echo "Expected an idle node after 20 s; got none. See $dir/slurmctld.log." >&2
    exit 1 ;;
restart) slurmd ;;
stop)
    scancel --user=root 2>/dev/null || true
    for _ in $(seq 40); do [ -n "$(squeue --noheader 2>/dev/null)" ] || break; sleep .5; done
    for name in slurmd slurmctld; do
        [ -s "$dir/$name.pid" ] || continue
        pid=$(cat "$dir/$name.pid")
        kill "$pid" || continue
        for _ in $(seq 20); do kill -0 "$pid" 2>/dev/null || continue 2; sleep .25; done
        kill -9 "$pid" || true
    done ;;
esac
