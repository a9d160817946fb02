#!/bin/sh
# Says in one line what this machine lacks, before anything is downloaded or built. Usage: check.sh PYTHON [test]
#
# PYTHON is empty when none was found that is new enough and can make virtual environments.

python=$1
what= apt= dnf=

lacks() { # what it is, Debian's packages, Fedora's packages
  what="${what:+$what, }$1" apt="$apt $2" dnf="$dnf $3"
}

if [ -z "$python" ]; then
  lacks "Python 3.11 or newer with venv" "python3 python3-venv" "python3"
fi
# The embedded engine is compiled with OpenMP. Without Python, look where loaders look.
if [ -n "$python" ]; then
  "$python" -c 'import ctypes; ctypes.CDLL("libgomp.so.1")' 2>/dev/null || lacks "libgomp.so.1 (for the engine)" libgomp1 libgomp
  "$python" -c 'import ctypes; ctypes.CDLL("libstdc++.so.6")' 2>/dev/null || lacks "libstdc++.so.6 (for the engine)" libstdc++6 libstdc++
elif ! find /lib /usr/lib /lib64 /usr/lib64 -maxdepth 2 -name 'libgomp.so.1' 2>/dev/null | grep -q .; then
  lacks "libgomp.so.1 (for the engine)" libgomp1 libgomp
fi
if [ "${2:-}" = test ]; then
  echo '#include <stdio.h>' | cc -E - >/dev/null 2>&1 ||
    lacks "a C compiler (for the simulated GPUs of the tests)" "gcc libc6-dev" "gcc glibc-devel"
fi

[ -z "$what" ] && exit 0
if command -v apt-get >/dev/null; then
  remedy="; as root: apt-get install$apt"
elif command -v dnf >/dev/null; then
  remedy="; as root: dnf install$dnf"
else
  remedy="; install them with this system's package manager (Debian calls them$apt)"
fi
echo "cannot set up: this machine lacks $what$remedy" >&2
exit 1
