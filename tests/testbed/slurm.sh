# SLURM for a test bed; sourced by testbed.sh, which says what a node is and gives $TB, $NODES, enter, wait_for.
#
# Every node runs its own munged, gpu01 .. gpu05 a slurmd, and head slurmctld, with slurmdbd and a MariaDB where
# TB_SLURM is slurmdbd.  Each GPU node claims 16 CPUs, 32 GB and 8 GPUs, whose device files have no driver behind.
# Partitions: main (the default), low (preempted by the others, with requeue, after GraceTime), high.
SLURM_CACHE=/var/cache/launch-testbed        # survives `down`: an initialised accounting database
SLURM_DATABASE=/var/lib/testbed-mysql        # on head
SLURM_GPUS=8
SLURM_CPUS=16
SLURM_MEMORY_MB=32000
SLURM_CONTROLLERS="freezer memory devices"   # of cgroup v1: what proctrack/cgroup and task/cgroup use
SLURM_NODES="gpu[01-05]"

with_slurm() { [ "$TB_SLURM" != off ]; }
with_accounting() { [ "$TB_SLURM" = slurmdbd ]; }
slurm_cgroup_v1() { # whether jobs can be held in cgroups: SLURM 22.05 does it reliably with version 1 only
  local controller; for controller in $SLURM_CONTROLLERS; do
    [ -e "$CG/$controller/cgroup.procs" ] || return 1; done; }
slurm_cgroups() { # NODE: the cgroup directories that a node of a SLURM bed has besides; also those of an abandoned one
  local controller
  for controller in $SLURM_CONTROLLERS; do
    if [ "$controller" = memory ]; then continue; fi
    if [ -d "$CG/$controller/$LABEL" ] || { with_slurm && slurm_cgroup_v1; }; then
      echo "$CG/$controller/$LABEL/$1"; fi; done; }
slurm_needs() {
  case $TB_SLURM in off) return;; slurmdbd|none) ;; *) die "TB_SLURM is off, none or slurmdbd, not $TB_SLURM";; esac
  local tool missing=
  for tool in slurmctld slurmd squeue munged; do command -v $tool >/dev/null || missing+=" $tool"; done
  if with_accounting; then for tool in slurmdbd mariadbd mariadb-install-db my_print_defaults; do
    command -v $tool >/dev/null || missing+=" $tool"; done; fi
  [ -z "$missing" ] || die "no$missing: .ci/packages testbed installs what is needed"
}

# ------------------------------------------------------------------------------------------------ files
write_slurm_files() {
  with_slurm || return 0
  mkdir -p "$TB"/etc/{slurm,munge}
  dd if=/dev/urandom of="$TB/etc/munge/munge.key" bs=128 count=1 status=none
  chown -R munge: "$TB/etc/munge"; chmod 700 "$TB/etc/munge"; chmod 400 "$TB/etc/munge/munge.key"
  write_slurm_conf >"$TB/etc/slurm/slurm.conf"
  echo "NodeName=$SLURM_NODES Name=gpu Type=h100 File=/dev/nvidia[0-$((SLURM_GPUS - 1))]" >"$TB/etc/slurm/gres.conf"
  write_cgroup_conf >"$TB/etc/slurm/cgroup.conf"
  if with_accounting; then
    write_slurmdbd_conf >"$TB/etc/slurm/slurmdbd.conf"
    chown slurm: "$TB/etc/slurm/slurmdbd.conf"; chmod 600 "$TB/etc/slurm/slurmdbd.conf"
    restore_database
  fi
}
write_slurm_conf() {
  local proctrack=linuxproc task=none
  if slurm_cgroup_v1; then proctrack=cgroup task=cgroup; fi
  cat <<E
ClusterName=testbed
SlurmctldHost=head
SlurmUser=slurm
AuthType=auth/munge
# cred_expire is also how long a requeued job waits (BeginTime) before it may start again; less than 5 means 120
AuthInfo=cred_expire=5
SlurmctldPidFile=/run/slurm/slurmctld.pid
SlurmdPidFile=/run/slurm/slurmd.pid
SlurmctldLogFile=/var/log/slurm/slurmctld.log
SlurmdLogFile=/var/log/slurm/slurmd.log
SlurmctldDebug=verbose
SlurmdDebug=verbose
LogTimeFormat=iso8601_ms
SlurmdSpoolDir=/var/spool/slurmd
StateSaveLocation=/var/spool/slurmctld
MpiDefault=none
SwitchType=switch/none
ProctrackType=proctrack/$proctrack
TaskPlugin=task/$task
JobAcctGatherType=jobacct_gather/linux
JobAcctGatherFrequency=5
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU_Memory
# the nodes claim more than the machine beneath them has
SlurmdParameters=config_overrides
PropagateResourceLimits=NONE
ReturnToService=2
JobRequeue=1
MailProg=/bin/true
GresTypes=gpu
DefMemPerCPU=$((SLURM_MEMORY_MB / SLURM_CPUS))
# short timers: a dead node is DOWN, and its job requeued, after some 15 s instead of minutes
SlurmctldTimeout=10
SlurmdTimeout=10
MessageTimeout=5
TCPTimeout=2
KillWait=3
MinJobAge=30
InactiveLimit=0
CompleteWait=0
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_interval=2,sched_min_interval=0,bf_interval=2,bf_continue
SlurmctldParameters=preempt_send_user_signal
PriorityType=priority/basic
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
MaxArraySize=20001
MaxJobCount=20000
NodeName=$SLURM_NODES CPUs=$SLURM_CPUS Boards=1 SocketsPerBoard=1 CoresPerSocket=$SLURM_CPUS ThreadsPerCore=1 RealMemory=$SLURM_MEMORY_MB Gres=gpu:h100:$SLURM_GPUS State=UNKNOWN
PartitionName=DEFAULT Nodes=$SLURM_NODES MaxTime=INFINITE State=UP OverSubscribe=NO
PartitionName=main Default=YES PriorityTier=10 PreemptMode=OFF
PartitionName=low  PriorityTier=1  PreemptMode=REQUEUE GraceTime=10
PartitionName=high PriorityTier=100 PreemptMode=OFF
E
  if with_accounting; then cat <<E
AccountingStorageType=accounting_storage/slurmdbd
AccountingStorageHost=head
AccountingStorageEnforce=associations
AccountingStorageTRES=gres/gpu
AccountingStoreFlags=job_comment
E
  else echo "AccountingStorageType=accounting_storage/none"; fi
}
write_cgroup_conf() {
  local constrain=no; ! slurm_cgroup_v1 || constrain=yes
  cat <<E
CgroupPlugin=cgroup/v1
CgroupAutomount=no
ConstrainDevices=$constrain
ConstrainRAMSpace=$constrain
ConstrainSwapSpace=no
ConstrainCores=no
E
}
write_slurmdbd_conf() { cat <<E
AuthType=auth/munge
DbdHost=head
SlurmUser=slurm
PidFile=/run/slurm/slurmdbd.pid
LogFile=/var/log/slurm/slurmdbd.log
DebugLevel=info
StorageType=accounting_storage/mysql
StorageHost=localhost
StorageUser=slurm
StorageLoc=slurm_acct_db
E
}

# ------------------------------------------------------------------------------------------------ the database
database_snapshot() { # of these packages, made as this file says
  local versions; versions=$(dpkg-query -W -f '${Version} ' slurmdbd mariadb-server-core)
  echo "$SLURM_CACHE/mysql-$(echo "$versions" | cat - "$TB/slurm.sh" | md5sum | cut -c1-12).tar"; }
restore_database() { # into head's own /var, before it boots
  local snapshot dir=$TB/nodes/head/var.up${SLURM_DATABASE#/var}
  snapshot=$(database_snapshot)
  mkdir -p "$dir"; chown slurm: "$dir"
  [ ! -e "$snapshot" ] || tar -C "$dir" -xf "$snapshot"
}
keep_database() { # the snapshot that head made on the very first start
  local snapshot made=$TB/nodes/head/var.up${SLURM_DATABASE#/var}.tar
  [ -e "$made" ] || return 0
  snapshot=$(database_snapshot)
  mkdir -p "$SLURM_CACHE"; rm -f "$SLURM_CACHE"/mysql-*.tar
  cp "$made" "$snapshot.part"; mv "$snapshot.part" "$snapshot"; rm "$made"
}
create_database() { # on head, with nothing running: accounts, the cluster registered, then a copy taken at rest
  mariadb-install-db --no-defaults --user=slurm --datadir="$SLURM_DATABASE" --skip-test-db \
    --auth-root-authentication-method=normal --innodb-log-file-size=8M --innodb-autoextend-increment=1 || return 1
  daemon start mariadb; daemon start slurmdbd
  sacctmgr -i add cluster testbed
  sacctmgr -i add account lab Description=lab Organization=lab Cluster=testbed
  sacctmgr -i add user root,alice,bob Account=lab Cluster=testbed
  sed '$aSlurmctldPort=6816' /etc/slurm/slurm.conf >/etc/slurm/unheard.conf   # by no slurmd: this one is not to stay
  SLURM_CONF=/etc/slurm/unheard.conf /usr/sbin/slurmctld; wait_for 10 sh -c 'sacctmgr -n show tres | grep -q gpu'
  daemon stop slurmctld; rm -rf /var/spool/slurmctld/*
  daemon stop slurmdbd; daemon stop mariadb
  tar -C "$SLURM_DATABASE" -cf "$SLURM_DATABASE.tar.part" . && mv "$SLURM_DATABASE.tar.part" "$SLURM_DATABASE.tar"
}

# ------------------------------------------------------------------------------------------------ inside a node
slurm_dev() { # DEV: NVIDIA's own numbers; opening one gives ENXIO, or EPERM where the job has no right to it
  local i; with_slurm || return 0
  for ((i = 0; i < SLURM_GPUS; i++)); do mknod -m 666 "$1/nvidia$i" c 195 "$i"; done; }
slurm_mount_cgroups() {
  local controller; with_slurm && slurm_v1_inside || return 0
  for controller in $SLURM_CONTROLLERS; do
    [ -d "$CG/$controller" ] && continue   # memory is there in every bed
    mkdir "$CG/$controller"; mount -t cgroup -o "$controller" cgroup "$CG/$controller"; done; }
slurm_v1_inside() { grep -q '^ProctrackType=proctrack/cgroup' /etc/slurm/slurm.conf; }
slurm_services() { # NODE
  mkdir -p /run/{munge,slurm,mysqld} /var/log/{slurm,munge} /var/spool/{slurmd,slurmctld} /var/lib/munge
  chown munge: /run/munge /var/log/munge /var/lib/munge
  chown slurm: /run/slurm /run/mysqld /var/log/slurm /var/spool/slurmctld
  chmod 755 /run/munge; chmod 700 /var/lib/munge /var/log/munge
  daemon start munged
  if [ "$1" != head ]; then
    wait_port head 6817   # a slurmd that finds no controller asks again after 1, 2, 4 .. 128 s
    daemon start slurmd; return; fi
  if with_accounting; then
    [ -d "$SLURM_DATABASE/mysql" ] || create_database
    daemon start mariadb; daemon start slurmdbd
  fi
  daemon start slurmctld
}
wait_port() { wait_for 30 bash -c ": 3<>/dev/tcp/$1/$2"; }   # HOST PORT
# Reached only through a socket in head's private /run, so it needs no passwords.
MARIADB=(/usr/sbin/mariadbd --no-defaults --user=slurm --datadir=$SLURM_DATABASE --socket=/run/mysqld/mysqld.sock
  --pid-file=/run/mysqld/mysqld.pid --tmpdir=/tmp --skip-networking --skip-grant-tables --skip-log-bin
  --performance-schema=OFF --innodb-buffer-pool-size=32M --innodb-log-file-size=8M --innodb-doublewrite=0
  --innodb-flush-log-at-trx-commit=0 --innodb-lock-wait-timeout=900 --innodb-fast-shutdown=1
  --innodb-autoextend-increment=1 --key-buffer-size=1M --aria-pagecache-buffer-size=4M --max-connections=40
  --thread-cache-size=8 --open-files-limit=4096)
pid_file() { case $1 in
  sshd) echo /run/sshd.pid;;
  munged) echo /run/munge/munged.pid;;
  mariadb) echo /run/mysqld/mysqld.pid;;
  slurmd|slurmctld|slurmdbd) echo "/run/slurm/$1.pid";;
  *) echo "unknown daemon $1" >&2; return 2;; esac; }
daemon() { # start|stop|kill9 NAME, inside a node; started again while it runs it stays as it is
  local action=$1 name=$2 file pid; file=$(pid_file "$name") || return
  pid=$(cat "$file" 2>/dev/null) || pid=
  case $action in
  start) [ -z "$pid" ] || [ ! -d "/proc/$pid" ] || return 0
    start_daemon "$name"; wait_for 10 test -s "$file"
    case $name in   # their pid files come before they listen
      slurmctld) wait_port head 6817;; slurmd) wait_port "$(hostname)" 6818;; slurmdbd) wait_port head 6819;; esac;;
  stop) [ -n "$pid" ] || return 0
    kill "$pid"; wait_for 10 test ! -d "/proc/$pid"; rm -f "$file";;
  kill9) kill -9 "$pid"; wait_for 5 test ! -d "/proc/$pid"; rm -f "$file";;
  *) echo "unknown action $action" >&2; return 2;; esac
}
start_daemon() { case $1 in
  sshd) /usr/sbin/sshd -f /etc/ssh/sshd_config -E /var/log/sshd.log;;
  munged) setpriv --reuid=munge --regid=munge --init-groups /usr/sbin/munged --num-threads=2 \
    --pid-file=/run/munge/munged.pid --log-file=/var/log/munge/munged.log;;
  mariadb) setsid "${MARIADB[@]}" </dev/null >/var/log/mariadb.log 2>&1 & ;;
  slurmdbd) wait_for 10 test -S /run/mysqld/mysqld.sock; /usr/sbin/slurmdbd;;
  slurmctld) # without slurmdbd a very first start is fatal: "we have no TRES"
    if grep -q '^AccountingStorageHost' /etc/slurm/slurm.conf && [ ! -e /var/spool/slurmctld/last_tres ]; then
      wait_port head 6819; fi
    /usr/sbin/slurmctld;;
  slurmd) /usr/sbin/slurmd;;
  esac; }

# ------------------------------------------------------------------------------------------------ from outside
daemon_in() { # NODE start|stop|kill9 NAME
  local node=$1; shift
  enter "$node" env -i PATH=$NODE_PATH LANG=C.UTF-8 bash -c \
    "$(declare -p SLURM_DATABASE MARIADB); $(declare -f wait_for wait_port pid_file daemon start_daemon); daemon $*" \
    </dev/null; }
slurm_answers() { ! with_slurm || enter head scontrol ping >/dev/null 2>&1; }
slurm_idle() { [ "$(enter head sinfo -hN -p main -o %T 2>/dev/null | grep -cx idle)" = 5 ]; }
await_slurm() {
  with_slurm || return 0
  wait_for 30 enter head bash -c ': 3<>/dev/tcp/head/6817' || die "slurmctld did not start"   # else sinfo waits 1 s
  wait_for 30 slurm_idle || { enter head sinfo -N -l >&2 || :; die "SLURM's nodes did not become idle"; }
  ! with_accounting || wait_for 20 enter head sacct -n || die "sacct does not answer"
  keep_database
}
