#!/bin/bash
# A small cluster of ssh nodes, with SLURM if wanted, on one machine, made of Linux namespaces.  Needs root.
#
#   testbed.sh up | down | status
#   testbed.sh ps | sweep | mounts           the users' processes (sweep kills them), the mounts; of all nodes
#   testbed.sh exec NODE [-u USER] CMD...    run CMD inside a node: head, gpu01 .. gpu05
#   testbed.sh fault NODE ACTION [ARG...]    see fault() below
#
# A node has its own net, uts, pid, mount, ipc and cgroup namespaces: address, hostname, process table, /dev
# with /dev/shm, /etc, /var, /run, /tmp, /root, /scratch, boot id and sshd with its own host key.  The switch
# between the nodes is a network namespace too, so that the host itself gets no new address.
#
#   TB_NAME     instance; instances live side by side without seeing each other        (main)
#   TB_HOME     shared: one /home for all nodes; private: one per node                 (shared)
#   TB_SLURM    off; none: SLURM without accounting; slurmdbd: with it (slurm.sh)      (off)
#   TB_BIND     host paths, one a line, that stay visible under the private directories
#   TB_OWNER    pid: the next `up` of any instance removes this one once that process is gone
#   TB_STARTUPS sshd's MaxStartups                                                     (200)
#   TB_SIZE     limit of the tmpfs that holds everything the nodes write               (6g)
set -euo pipefail
export PATH=$PATH:/usr/sbin:/sbin LC_ALL=C
SELF=$(readlink -f "$0")
BASE=/srv/launch-testbed
NAME=${TB_NAME:-main}
NET=10.77.0
USERS="alice:2001 bob:2002"
NODES="head gpu01 gpu02 gpu03 gpu04 gpu05"
CG=/sys/fs/cgroup
NODE_PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin
PRIVATE="/etc /var /run /tmp /root /home /scratch /dev"   # what a node does not share with the host

die() { echo "testbed: $*" >&2; exit 1; }
instance() { NAME=$1; TB=$BASE.$NAME; LABEL=${TB##*/}; }
address() { if [ "$1" = head ]; then echo $NET.10; else echo $NET.$((10 + 10#${1#gpu})); fi; }
in_net() { local ns=$1; shift; nsenter --net="$TB/net/$ns" -- "$@"; }
wait_for() { local seconds=$1 i; shift; for ((i = 0; i < seconds * 50; i++)); do
  "$@" >/dev/null 2>&1 && return 0; sleep .02; done; return 1; }

# ------------------------------------------------------------------------------------------------ processes
start_time() { local s; s=$(<"/proc/$1/stat") || return 1; set -- ${s##*) }; echo "${20}"; }
init_pid() { # host pid of a node's init; its start time guards against a pid used again
  local pid started
  read -r pid started 2>/dev/null <"$TB/nodes/$1/init.pid" || return 1
  [ "$(start_time "$pid" 2>/dev/null)" = "$started" ] && echo "$pid"; }
gone() { ! init_pid "$1" >/dev/null; }
cgroups() { # cgroup directories of a node, or of the bed; v2 freezes, memory is where its controller is
  local v2
  for v2 in "$CG" "$CG/unified"; do [ ! -e "$v2/cgroup.controllers" ] || echo "$v2/$LABEL/${1:-}"; done
  [ ! -d "$CG/memory" ] || echo "$CG/memory/$LABEL/${1:-}"
  slurm_cgroups "${1:-}"; }
join_cgroups() { local dir; for dir in $(cgroups "$1"); do
  mkdir -p "$dir"; echo "$BASHPID" >"$dir/cgroup.procs"; done; }
enter() ( # run a command in a node; descriptor 9 is the lock, which a daemon must not inherit
  pid=$(init_pid "$1") || die "$1 is not running"
  join_cgroups "$1"; shift
  exec nsenter -t "$pid" -m -u -i -n -p -C -- "$@" 9>&- )
run_in() { # NODE [-u USER] CMD...
  local node=$1 user=root home=/root; shift
  if [ "${1:-}" = -u ]; then user=$2; shift 2; [ "$user" = root ] || home=/home/$user; fi
  enter "$node" setpriv --reuid="$user" --regid="$user" --init-groups -- env -i HOME="$home" USER="$user" \
    LOGNAME="$user" PATH=$NODE_PATH LANG=C.UTF-8 sh -c 'cd && exec "$@"' sh "$@"; }

# ------------------------------------------------------------------------------------------------ one node
node_init() { # PID 1 of a node; until it mounts its own, /proc is the host's
  local node=$1 dir=$TB/nodes/$1 stat pid path i=0
  read -r stat </proc/self/stat; pid=${stat%% *}
  echo "$pid $(start_time "$pid")" >"$dir/init.pid"
  trap '' HUP INT; cd /
  hostname "$node"
  mount --make-rprivate /
  for path in "$BASE".*; do   # a copy of another instance's mounts would outlive it
    [ "$path" = "$TB" ] || ! mountpoint -q "$path" || umount -R -l "$path"; done
  while read -r path; do
    [ -e "$path" ] && under_private "$path" || continue
    mkdir -p "$dir/keep/$i"; mount --rbind "$path" "$dir/keep/$i"; i=$((i + 1))
  done <<<"$TB_BIND"
  mount -t overlay -o "lowerdir=$TB/etc:/etc,upperdir=$dir/etc.up,workdir=$dir/etc.work" etc /etc
  mount -t overlay -o "lowerdir=/var,upperdir=$dir/var.up,workdir=$dir/var.work" var /var
  for path in run tmp root scratch; do mount --bind "$dir/$path" "/$path"; done
  if [ "$TB_HOME" = shared ]; then mount --bind "$TB/home" /home; else mount --bind "$dir/home" /home; fi
  i=0; while read -r path; do
    [ -d "$dir/keep/$i" ] && under_private "$path" || continue
    mkdir -p "$path"; mount --move "$dir/keep/$i" "$path"; i=$((i + 1))
  done <<<"$TB_BIND"
  node_dev "$dir/dev" "$node"
  mount -t proc proc /proc
  mount --bind "$dir/boot_id" /proc/sys/kernel/random/boot_id   # the kernel's own never changes
  mount -t sysfs sysfs /sys
  node_cgroups
  slurm_mount_cgroups
  mkdir -p /run/sshd /run/lock
  mount -t tmpfs -o ro,size=4k,mode=755 hidden "$TB"   # no back door to the other nodes' files
  daemon start sshd
  ! with_slurm || slurm_services "$node" &
  : >/run/booted
  while :; do sleep infinity & wait $! || :; done               # bash reaps the orphans of the node
}
under_private() { local top; for top in $PRIVATE; do case $1 in "$top"/*) return 0;; esac; done; return 1; }
node_dev() {
  local dev=$1
  mount -t tmpfs -o mode=755,size=64k,nosuid dev "$dev"
  mkdir "$dev"/{pts,shm,mqueue}
  cp -a /dev/{null,zero,full,random,urandom,tty} "$dev/"
  ln -s /proc/self/fd "$dev/fd"; ln -s fd/0 "$dev/stdin"; ln -s fd/1 "$dev/stdout"; ln -s fd/2 "$dev/stderr"
  ln -s pts/ptmx "$dev/ptmx"
  mount -t devpts -o newinstance,ptmxmode=0666,mode=620,gid=5 devpts "$dev/pts"
  mount -t tmpfs -o mode=1777,size=1g shm "$dev/shm"
  [ "$2" = head ] || slurm_dev "$dev"
  mount --move "$dev" /dev
}
node_cgroups() { # the node's own view, through its cgroup namespace
  if grep -q '^memory.*1$' /proc/cgroups && [ -n "$TB_MEMORY_V1" ]; then
    mount -t tmpfs -o mode=755 cgroup $CG
    mkdir $CG/memory; mount -t cgroup -o memory cgroup $CG/memory
  else mount -t cgroup2 cgroup2 $CG || :; fi
}
node_up() {
  local node=$1 dir=$TB/nodes/$1 memory_v1=
  [ ! -d $CG/memory ] || memory_v1=1
  rm -rf "$dir"/run "$dir"/tmp
  mkdir -p "$dir"/{run,tmp,keep}; chmod 1777 "$dir/tmp"
  cat /proc/sys/kernel/random/uuid >"$dir/boot_id"; chmod 444 "$dir/boot_id"
  ( join_cgroups "$node"
    exec setsid nsenter --net="$TB/net/$node" \
      unshare --uts --ipc --mount --pid --cgroup --fork --kill-child=SIGKILL \
      env -i PATH=$NODE_PATH HOME=/root LANG=C.UTF-8 TB_NAME="$NAME" TB_HOME="$TB_HOME" TB_BIND="$TB_BIND" \
      TB_SLURM="$TB_SLURM" TB_MEMORY_V1=$memory_v1 bash "$TB/testbed.sh" _init "$node"
  ) </dev/null >>"$dir/console.log" 2>&1 9>&- &
  disown
}
booted() { [ -e "$TB/nodes/$1/run/booted" ] && [ -s "$TB/nodes/$1/run/sshd.pid" ]; }
await_boot() { wait_for 10 booted "$1" || { cat "$TB/nodes/$1/console.log" >&2; die "$1 did not boot"; }; }

# ------------------------------------------------------------------------------------------------ files
write_accounts() {
  local user
  cp -p /etc/passwd /etc/group /etc/shadow "$TB/etc/"
  for user in $USERS; do local name=${user%:*} id=${user#*:}
    echo "$name:x:$id:$id:$name:/home/$name:/bin/bash" >>"$TB/etc/passwd"
    echo "$name:x:$id:" >>"$TB/etc/group"
    echo "$name:*:19000:0:99999:7:::" >>"$TB/etc/shadow"        # '*': sshd refuses '!'
  done
}
make_home() { # DIR NAME ID: a home directory with the user's key
  cp -r /etc/skel "$1"; mkdir -m 700 "$1/.ssh"
  cp "$TB/ssh/id_$2" "$1/.ssh/id_ed25519"; chown -R "$3:$3" "$1"; chmod 755 "$1"
}
write_node() {
  local node=$1 dir=$TB/nodes/$1 user name id type key
  mkdir -p "$dir"/{etc.up/ssh,etc.work,var.up,var.work,scratch,dev,home}; chmod 1777 "$dir/scratch"
  echo "$node" >"$dir/etc.up/hostname"
  tr -d - </proc/sys/kernel/random/uuid >"$dir/etc.up/machine-id"
  ssh-keygen -q -t ed25519 -N '' -C "$node" -f "$dir/etc.up/ssh/ssh_host_ed25519_key"
  read -r type key _ <"$dir/etc.up/ssh/ssh_host_ed25519_key.pub"
  echo "$node,$(address "$node") $type $key" >>"$TB/ssh/known_hosts"
  make_home "$dir/root" root 0
  for user in $USERS; do name=${user%:*} id=${user#*:}
    mkdir "$dir/scratch/$name"; chown "$id:$id" "$dir/scratch/$name"
    [ "$TB_HOME" = shared ] || make_home "$dir/home/$name" "$name" "$id"
  done
}
write_files() {
  local user name node
  mkdir -p "$TB"/{etc/ssh/{keys,ssh_config.d,sshd_config.d},home,nodes,ssh,net}
  write_accounts
  for name in root alice bob; do
    ssh-keygen -q -t ed25519 -N '' -C "$name@testbed" -f "$TB/ssh/id_$name"
    cp "$TB/ssh/id_$name.pub" "$TB/etc/ssh/keys/$name"
  done
  for user in $USERS; do name=${user%:*}
    [ "$TB_HOME" != shared ] || make_home "$TB/home/$name" "$name" "${user#*:}"; done
  for node in $NODES; do write_node "$node"; done
  echo "127.0.0.1 localhost" >"$TB/etc/hosts"
  for node in $NODES; do echo "$(address "$node") $node" >>"$TB/etc/hosts"; done
  : >"$TB/etc/resolv.conf"                                      # no DNS: a stray look-up fails at once
  cp "$TB/ssh/known_hosts" "$TB/etc/ssh/ssh_known_hosts"
  write_slurm_files
  write_sshd_config >"$TB/etc/ssh/sshd_config"
  { ssh_hosts; printf 'Host head gpu*\n  StrictHostKeyChecking yes\n'
  } >"$TB/etc/ssh/ssh_config.d/testbed.conf"
  for name in root alice bob; do write_client_config "$name" >"$TB/ssh/config.$name"; done
  chown "${SUDO_UID:-0}" "$TB"/ssh/id_*                         # under sudo, the caller's own ssh reads them
}
write_sshd_config() { cat <<E
Include /etc/ssh/sshd_config.d/*.conf
Port 22
HostKey /etc/ssh/ssh_host_ed25519_key
AuthorizedKeysFile /etc/ssh/keys/%u
PidFile /run/sshd.pid
UsePAM no
UseDNS no
PasswordAuthentication no
KbdInteractiveAuthentication no
PermitRootLogin prohibit-password
PrintMotd no
PrintLastLog no
MaxStartups ${TB_STARTUPS:-200}
MaxSessions 100
AcceptEnv LANG LC_*
LogLevel VERBOSE
Subsystem sftp internal-sftp
E
}
ssh_hosts() { local node; for node in $NODES; do
  printf 'Host %s\n  HostName %s\n' "$node" "$(address "$node")"; done; }
write_client_config() { # USER: for callers in the host's own namespaces, who have no route to the nodes
  ssh_hosts
  cat <<E
Host inner
  HostName $(address gpu05)
  ProxyJump head
Host head gpu*
  ProxyCommand ${SUDO_UID:+sudo -n }nsenter --net=$TB/net/head socat - TCP:%h:%p
Host inner head gpu*
  User $1
  IdentityFile $TB/ssh/id_$1
  IdentitiesOnly yes
  UserKnownHostsFile $TB/ssh/known_hosts
  GlobalKnownHostsFile /dev/null
  StrictHostKeyChecking yes
  ConnectTimeout 5
E
}

# ------------------------------------------------------------------------------------------------ up and down
network_up() {
  local node
  for node in switch $NODES; do : >"$TB/net/$node"; unshare --net="$TB/net/$node" true; done
  { echo "link add br0 type bridge"; echo "link set br0 up"; echo "link set lo up"
    for node in $NODES; do
      echo "link add p-$node type veth peer name eth0 netns $TB/net/$node"
      echo "link set p-$node master br0 up"
    done; } | in_net switch ip -batch -
  for node in $NODES; do
    printf 'link set lo up\naddr add %s/24 dev eth0\nlink set eth0 up\n' "$(address "$node")" |
      in_net "$node" ip -batch -
  done
}
is_up() { local node; mountpoint -q "$TB" || return 1; for node in $NODES; do
  init_pid "$node" >/dev/null && booted "$node" || return 1; done; slurm_answers; }
settings() { declare -p TB_HOME TB_BIND TB_SLURM; }
up() {
  local tool node
  for tool in sshd ssh-keygen socat ip nft nsenter; do command -v $tool >/dev/null ||
    die "no $tool: apt-get install openssh-server openssh-client socat iproute2 nftables util-linux"; done
  slurm_needs
  remove_abandoned
  if is_up && [ "$(settings)" = "$(<"$TB/settings")" ]; then return; fi
  down
  mkdir -p "$TB"
  mount -t tmpfs -o "size=${TB_SIZE:-6g},mode=755" launch-testbed "$TB"; mount --make-private "$TB"
  [ -d /scratch ] || mkdir -m 555 /scratch   # a mount point; its mode says that it is ours to remove
  cp "$SELF" "$TB/testbed.sh"; cp "${SELF%/*}/slurm.sh" "$TB"; settings >"$TB/settings"
  [ -z "${TB_OWNER:-}" ] || echo "$TB_OWNER $(start_time "$TB_OWNER")" >"$TB/owner"
  write_files
  network_up
  for node in $NODES; do node_up "$node"; done
  for node in $NODES; do await_boot "$node"; done
  await_slurm
}
remove_abandoned() { # instances whose owner ended without `down`
  local owner pid started mine=$NAME
  for owner in "$BASE".*/owner; do
    [ -e "$owner" ] && read -r pid started <"$owner" || continue
    [ "$(start_time "$pid" 2>/dev/null)" = "$started" ] && continue
    owner=${owner%/owner}; instance "${owner#"$BASE".}"; down
  done
  instance "$mine"
}
netns_processes() { # processes of the host inside our networks: ProxyCommands, the netem bridge
  local inodes; inodes=$(stat -Lc 'net:[%i]' "$TB"/net/* 2>/dev/null) || return 0
  find /proc -maxdepth 3 -path '/proc/[0-9]*/ns/net' -printf '%P %l\n' 2>/dev/null |
    awk -v all="$inodes" 'BEGIN { n = split(all, a); for (i = 1; i <= n; i++) ours[a[i]] }
      $2 in ours { sub("/.*", "", $1); print $1 }'
}
down() {
  local node pid dir
  for node in $NODES; do if pid=$(init_pid "$node"); then kill -9 "$pid"; fi; done
  for node in $NODES; do wait_for 5 gone "$node" || die "$node does not die"; done
  if mountpoint -q "$TB"; then
    for pid in $(netns_processes); do kill -9 "$pid" 2>/dev/null || :; done
    wait_for 2 umount -R "$TB" || umount -R -l "$TB"
  fi
  for dir in $(cgroups); do
    [ ! -d "$dir" ] || wait_for 3 find "$dir" -depth -type d -exec rmdir {} + || :; done
  [ ! -d "$TB" ] || rmdir "$TB"
  compgen -G "$BASE.*" >/dev/null || [ "$(stat -c %a /scratch 2>/dev/null)" != 555 ] || rmdir /scratch
}
status() {
  local node pid
  mountpoint -q "$TB" || { echo "$NAME: down"; return 3; }
  for node in $NODES; do
    if pid=$(init_pid "$node"); then echo "$node $(address "$node") up, init $pid"
    else echo "$node powered off"; fi
  done
}
users_ps() { # NODE PID USER ARGS of every process of the users, seen from the host
  local node pid map=
  for node in $NODES; do if pid=$(init_pid "$node"); then
    map+="$(stat -Lc %i "/proc/$pid/ns/pid")=$node "; fi; done
  ps -eo pidns=,pid=,uid=,stat=,args= | awk -v map="$map" -v users="$USERS" '
    BEGIN { n = split(map, m); for (i = 1; i <= n; i++) { split(m[i], kv, "="); node[kv[1]] = kv[2] }
            n = split(users, m); for (i = 1; i <= n; i++) { split(m[i], kv, ":"); user[kv[2]] = kv[1] } }
    ($1 in node) && ($3 in user) { line = node[$1] " " $2 " " user[$3]
      for (i = 5; i <= NF; i++) line = line " " $i; print line }'
}
sweep() { local pid; users_ps | while read -r _ pid _; do kill -9 "$pid" 2>/dev/null || :; done; }
mounts() { local node pid; for node in $NODES; do if pid=$(init_pid "$node"); then
  awk -v node="$node" '{ print node, $5 }' "/proc/$pid/mountinfo"; fi; done; }

# ------------------------------------------------------------------------------------------------ faults
fault() {
  local node=$1 action=$2; shift 2
  [[ " $NODES " = *" $node "* ]] || die "no node named $node (there are: $NODES)"
  case $action in
  kill9|stop|start) daemon_in "$node" "$action" "$1";;   # of sshd: refused from now on, open sessions live
  link) in_net switch ip link set "p-$node" "$1";;              # link up|down: the cable
  freeze) set_freeze "$node" 1;;   # a hung node: it answers ping, nothing else
  thaw) set_freeze "$node" 0;;
  poweroff) in_net switch ip link set "p-$node" down            # the link first, so that no FIN or RST leaves
    kill -9 "$(init_pid "$node")"; wait_for 5 gone "$node";;
  poweron) in_net switch ip link set "p-$node" up
    if gone "$node"; then node_up "$node"; fi; await_boot "$node";;
  partition) local other addresses=   # partition head gpu01: its frames to those are dropped
    for other in "$@"; do addresses+="$(address "$other"),"; done
    drop "$node" "hook ingress" "ip daddr { ${addresses%,} }";;
  loss) # loss 2: percent of the frames, in each direction
    local match; match=$(awk -v p="$1" 'BEGIN { if (p < 100) print "numgen random mod 1000 <", int(p * 10) }')
    drop "$node" "hook ingress" "$match"; drop "$node" "hook egress" "$match";;
  heal) in_net switch nft delete table netdev "drop_$node" 2>/dev/null || :;;
  netem) netem_off "$node"; netem_on "$node" "$@";;             # netem --delay MS --loss PERCENT, each way
  netem-off) netem_off "$node";;
  diskfull) # diskfull DIR [SIZE]: a full file system there
    enter "$node" sh -ec 'mkdir -p "$1"; mount -t tmpfs -o "size=$2,mode=1777" full "$1"
      head -c "$2" /dev/zero >"$1/.filler"' sh "$1" "${2:-64k}";;
  readonly) # readonly DIR: a read-only file system there
    enter "$node" sh -ec 'mkdir -p "$1"; mount -t tmpfs -o ro,size=4k,mode=1777 readonly "$1"' sh "$1";;
  unmount) enter "$node" umount -l "$1";;                       # ends diskfull and readonly
  memlimit) set_memory "$node" "$1";;                           # memlimit 200M; memlimit max lifts it
  *) die "unknown fault $action";;
  esac
}
set_freeze() {
  local dir
  for dir in $(cgroups "$1"); do if [ -e "$dir/cgroup.freeze" ]; then
    echo "$2" >"$dir/cgroup.freeze"; wait_for 5 grep -q "frozen $2" "$dir/cgroup.events"; return; fi; done
  die "freezing needs cgroup v2 and there is none under $CG"
}
set_memory() {
  local dir
  for dir in $(cgroups "$1"); do
    if [ -e "$dir/memory.max" ]; then echo "$2" >"$dir/memory.max"; return; fi
    if [ -e "$dir/memory.limit_in_bytes" ]; then echo "${2/max/-1}" >"$dir/memory.limit_in_bytes"; return; fi
  done
  die "no memory cgroup under $CG"
}
drop() { # NODE HOOK MATCH: drop the matching frames at the node's switch port
  in_net switch nft -f - <<E
table netdev drop_$1 {
  chain ${2#hook } { type filter $2 device "p-$1" priority 0; $3 counter drop; }
}
E
}
netem_on() {
  local node=$1 log=$TB/netem.$1.log script python pid; shift
  script=$(dirname "$SELF")/netem.py; python=$(command -v python3) || die "netem needs python3"
  in_net switch ip -batch - <<E
link add n-$node type veth peer name m-$node
link set n-$node up
link set m-$node master br0 up
link set p-$node nomaster
E
  in_net "$node" "$python" "$script" --offload-off eth0
  in_net switch "$python" "$script" --offload-off "m-$node"
  setsid nsenter --net="$TB/net/switch" "$python" "$script" "p-$node" "n-$node" "$@" \
    </dev/null >"$log" 2>&1 9>&- &
  pid=$!; disown
  echo "$pid $(start_time "$pid")" >"$TB/netem.$node.pid"
  wait_for 5 grep -q ready "$log" || { cat "$log" >&2; die "netem did not start"; }
}
netem_off() {
  local pid started
  [ -e "$TB/netem.$1.pid" ] || return 0
  read -r pid started <"$TB/netem.$1.pid"; rm "$TB/netem.$1.pid"
  [ "$(start_time "$pid" 2>/dev/null)" != "$started" ] || kill "$pid"
  printf 'link del n-%s\nlink set p-%s master br0\n' "$1" "$1" | in_net switch ip -batch -
}

. "${SELF%/*}/slurm.sh"
: "${TB_HOME:=shared}" "${TB_BIND:=}" "${TB_SLURM:=off}"
instance "$NAME"
[ "${1:-}" = _init ] || [ ! -e "$TB/settings" ] || [ "${1:-}" = up ] || . "$TB/settings"
case ${1:-} in
  up|down) [ "$(id -u)" = 0 ] || die "$1 needs root"
    exec 9</srv; flock -w 120 9; "$1";;
  status) status;;
  ps) users_ps;;
  sweep) sweep;;
  mounts) mounts;;
  exec) shift; run_in "$@";;
  fault) shift; fault "$@";;
  _init) set +e; node_init "$2";;   # PID 1 must survive what fails; console.log names it
  *) sed -n '2,/^set/{/^#/p}' "$SELF"; exit 2;;
esac
