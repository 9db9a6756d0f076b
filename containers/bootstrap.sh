#!/usr/bin/env bash
# From a fresh clone to a running flexsink, in one command:
#     bash containers/bootstrap.sh                          sets up only
#     bash containers/bootstrap.sh train tiny [ARGUMENTS]   sets up, then runs `flexsink train tiny ARGUMENTS`; with
#                                                           sandbox.backend=local among them Docker is left alone
#     bash containers/bootstrap.sh test [PYTEST ARGUMENTS]  sets up with the test tools, then runs lint, types, import contracts and tests
# What is set up: .venv with the versions of containers/requirements.lock, a Docker daemon, the sandbox image. What is there is kept.
# pip and apt use their own settings: a private certificate authority, an index or a folder of wheels go into PIP_CERT, PIP_INDEX_URL,
# PIP_FIND_LINKS and the like. PYTHON names the Python to use. Needs Python 3.11 to 3.13; for Docker either a daemon that answers, or root on
# Debian.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

fail() {  # fail MESSAGE HINT
    printf 'error: %s\nhint: %s\n' "$1" "$2" >&2
    exit 2
}
now() { date +%s.%N; }
since() { awk -v a="$1" -v b="$(now)" 'BEGIN { printf "%.1f", b - a }'; }
is_root() { [ "$(id -u)" = 0 ]; }

# --- Python -------------------------------------------------------------------------------------------------------------------------

supported() { "$1" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null; }

find_python() {
    local name
    if [ -n "${PYTHON:-}" ]; then
        supported "$PYTHON" || fail "PYTHON=$PYTHON is no Python 3.11, 3.12 or 3.13" "set PYTHON to one, or unset it"
        echo "$PYTHON"
        return
    fi
    for name in python3 python3.12 python3.11 python3.13; do
        if command -v "$name" >/dev/null && supported "$name"; then
            command -v "$name"
            return
        fi
    done
    fail "no Python 3.11, 3.12 or 3.13 (python3 is $(python3 --version 2>&1 || true))" \
        "on Debian 12 or newer: apt-get install python3 python3-venv; elsewhere set PYTHON to one"
}

usable_venv() {  # not where its Python is gone or another, which finds no pip, nor where its scripts name another folder
    [ -x .venv/bin/python ] && supported .venv/bin/python && .venv/bin/python -c 'import pip' 2>/dev/null &&
        [ -f .venv/bin/activate ] && ( . .venv/bin/activate && [ "$VIRTUAL_ENV" = "$(cd .venv && pwd -P)" ] )
}

make_venv() {
    usable_venv && return
    rm -rf .venv
    if ! "$python" -m venv .venv >/dev/null 2>&1; then
        rm -rf .venv
        is_root && command -v apt-get >/dev/null || fail "$python cannot make a virtual environment" "install python3-venv"
        apt_install python3-venv
        "$python" -m venv .venv
    fi
}

installed_mark() {  # installed_mark LOCK...: of what is installed, where, and for which Python
    {
        cat "$@" pyproject.toml
        pwd -P
        .venv/bin/python -c 'import sys; print(*sys.version_info[:2])' 2>/dev/null || echo none
    } | sha256sum | cut -d' ' -f1
}

install_python() {
    local locks=(containers/requirements.lock)
    [ "$mode" = test ] && locks+=(containers/requirements-test.lock)
    if [ -f .venv/flexsink-installed ] && grep -qx "$(installed_mark "${locks[@]}")" .venv/flexsink-installed; then
        return
    fi
    make_venv
    echo "installing Python packages ..."
    # Compiling on first import instead of all at once saves half a minute on 2 cores.
    .venv/bin/python -m pip install --quiet --no-input --disable-pip-version-check --progress-bar off --no-compile \
        "${locks[@]/#/-r}"
    .venv/bin/python -m pip install --quiet --no-input --disable-pip-version-check --no-deps --no-build-isolation -e .
    installed_mark "${locks[@]}" >> .venv/flexsink-installed
    # The test tools come on top of the others: what suffices to test suffices to run.
    installed_mark containers/requirements.lock >> .venv/flexsink-installed
}

# --- Docker -------------------------------------------------------------------------------------------------------------------------

DOCKER_LOG=/var/log/flexsink-dockerd.log

docker_answers() {
    "$python" - <<'PYTHON'
import os, socket, sys
host = os.environ.get("DOCKER_HOST", "unix:///var/run/docker.sock")
if not host.startswith("unix://"):
    sys.exit(0)  # the client that builds the image will say
with socket.socket(socket.AF_UNIX) as connection:
    connection.settimeout(5)
    try:
        connection.connect(host.removeprefix("unix://"))
        connection.sendall(b"GET /_ping HTTP/1.0\r\nHost: docker\r\n\r\n")
        sys.exit(b" 200 " not in connection.recv(64))
    except OSError:
        sys.exit(1)
PYTHON
}

apt_install() {
    (
        flock 9  # Python and Docker are set up side by side
        export DEBIAN_FRONTEND=noninteractive
        apt-get -qq update >/dev/null
        apt-get -qq install -y --no-install-recommends "$@" >/dev/null
    ) 9> /tmp/flexsink-apt.lock
}

start_dockerd() {  # start_dockerd OPTIONS: true when a daemon answers within 30 s
    local pid
    setsid dockerd "$@" >> "$DOCKER_LOG" 2>&1 < /dev/null &
    pid=$!
    for _ in $(seq 150); do
        docker_answers && return 0
        kill -0 "$pid" 2>/dev/null || return 1
        sleep 0.2
    done
    kill "$pid" 2>/dev/null
    return 1
}

check_docker() {  # fails at once when there is no daemon and no way to one
    docker_answers && return
    if [ -n "${DOCKER_HOST:-}" ]; then
        fail "no Docker daemon answers at DOCKER_HOST=$DOCKER_HOST" "start it, or unset DOCKER_HOST"
    elif ! is_root && [ -S /var/run/docker.sock ]; then
        fail "$(id -un) may not use Docker" "as root: usermod -aG docker $(id -un); then log in again"
    elif ! is_root; then
        fail "no Docker daemon answers" "start Docker (systemctl start docker), or run this script as root on Debian"
    elif ! command -v dockerd >/dev/null && ! command -v apt-get >/dev/null; then
        fail "Docker is not installed" "install it, then run this script again"
    fi
}

see_to_docker() {
    docker_answers && return
    if ! command -v dockerd >/dev/null; then
        echo "installing docker.io ..."
        apt_install docker.io || fail "apt-get could not install docker.io" "look at: apt-get install docker.io"
        sleep 1  # where there is systemd, the package starts the daemon
    fi
    if [ -d /run/systemd/system ]; then
        systemctl start docker 2>/dev/null || true
        for _ in $(seq 50); do
            docker_answers && return
            sleep 0.2
        done
    fi
    docker_answers && return
    echo "starting dockerd (log: $DOCKER_LOG) ..."
    # Sandboxes have no network: where the kernel has no bridges or firewall, the daemon does without. vfs works on every file system.
    start_dockerd || start_dockerd --iptables=false --ip6tables=false --bridge=none ||
        start_dockerd --iptables=false --ip6tables=false --bridge=none --storage-driver=vfs ||
        fail "dockerd does not start: $(grep -v level=info "$DOCKER_LOG" | tail -n 1)" "look at $DOCKER_LOG"
}

see_to_test_packages() {  # what tests run against: Chromium, docker-compose, PostgreSQL; what cannot be had has its tests skipped
    local wanted=() package
    command -v chromium chromium-browser google-chrome >/dev/null || wanted+=(chromium)
    command -v docker-compose >/dev/null || wanted+=(docker-compose)
    compgen -G "/usr/lib/postgresql/*/bin/postgres" >/dev/null || wanted+=(postgresql)
    is_root && command -v apt-get >/dev/null || return 0
    for package in "${wanted[@]}"; do
        echo "installing $package ..."
        apt_install "$package" || echo "$package could not be installed: its tests are skipped"
    done
}

# --- Everything ---------------------------------------------------------------------------------------------------------------------

status=0
num_empty=0  # runs of pytest that found no test for the arguments given
check() {  # check COMMAND...: goes on after a failure, which the exit status keeps
    local code=0
    echo "+ $*"
    PATH=$PWD/.venv/bin:$PATH "$@" || code=$?
    if [ "$code" = 5 ] && { [ "$1 ${3:-}" = "python pytest" ] || [ "$1" = measured ]; }; then  # no test was called for
        num_empty=$((num_empty + 1))
    elif [ "$code" != 0 ]; then
        status=$code
        echo "failed: $*" >&2
    fi
}

measured() {  # measured PYTEST ARGUMENTS: the tests that measure time; what misses its bar, as under load from elsewhere, a second time
    local code=0
    python -m pytest -m timed "$@" || code=$?
    [ "$code" = 1 ] || return "$code"
    python -m pytest -m timed --last-failed "$@"
}

mode=${1:-setup}
[ $# -gt 0 ] && shift
case "$mode" in
    setup | train | test) ;;
    *) fail "bootstrap.sh $mode" "give nothing, train PRESET or test" ;;
esac

start=$(now)
python=$(find_python)
case " $* " in
    *" sandbox.backend=local "*) docker=no ;;
    *)
        docker=yes
        check_docker
        see_to_docker &
        docker_job=$!
        ;;
esac
[ "$mode" = test ] && see_to_test_packages &
packages_job=$!
install_python
[ "$docker" = no ] || wait "$docker_job"
wait "$packages_job" || true
install_s=$(since "$start")

start=$(now)
[ "$docker" = no ] || .venv/bin/python -m stages.sandbox image
build_s=$(since "$start")

start=$(now)
case "$mode" in
    setup) echo "next: source .venv/bin/activate; flexsink train tiny" ;;
    train) .venv/bin/flexsink train "$@" || status=$? ;;
    test)
        check ruff check .
        check ruff format --check .
        check mypy
        check lint-imports
        check python -m pytest -n 2 --dist worksteal -m "not timed" "$@"
        check measured "$@"
        [ "$num_empty" -lt 2 ] || fail "no test is called for by $*" "look at: .venv/bin/python -m pytest --collect-only $*"
        ;;
esac
run_s=$(since "$start")
echo "install ${install_s} s, build ${build_s} s, run ${run_s} s"
exit "$status"
