#!/bin/sh
# Usage: packages.sh PROGRAM:PACKAGE...
# Installs the Debian packages of programs that are not there, and says so. Without root it prints the command and fails.
set -eu

PATH="$PATH:/usr/sbin:/sbin"
missing=""
for pair in "$@"; do
    program=${pair%%:*}
    package=${pair#*:}
    command -v "$program" >/dev/null 2>&1 && continue
    case " $missing " in *" $package "*) ;; *) missing="$missing $package" ;; esac
done
# PostgreSQL's own programs are not in PATH on Debian; its tests need pg_amcheck and pgbench, which the server's packages bring.
case " $* " in
*" psql:postgresql "*)
    if ! ls /usr/lib/postgresql/*/bin/initdb >/dev/null 2>&1; then
        case " $missing " in *" postgresql "*) ;; *) missing="$missing postgresql" ;; esac
    fi
    ;;
esac
[ -n "$missing" ] || exit 0

if ! command -v apt-get >/dev/null 2>&1; then
    echo "missing programs of the Debian packages:$missing; install what your system calls them" >&2
    exit 1
fi
if [ "$(id -u)" -ne 0 ]; then
    echo "missing packages; run this, then try again:" >&2
    echo "    sudo apt-get install --no-install-recommends$missing" >&2
    exit 1
fi
echo "installing missing Debian packages:$missing"
export DEBIAN_FRONTEND=noninteractive
# A package's own database cluster is not wanted: the tests make theirs.
if [ ! -e /etc/postgresql-common/createcluster.conf ]; then
    mkdir -p /etc/postgresql-common
    echo "create_main_cluster = false" >/etc/postgresql-common/createcluster.conf
fi
# shellcheck disable=SC2086
apt-get install -y -q --no-install-recommends $missing ||
    { apt-get update -q && apt-get install -y -q --no-install-recommends $missing; }
