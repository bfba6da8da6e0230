# shellcheck shell=bash
# What the scripts beside this file share. Sourced, not run.

# Colours and carriage returns only for people.
if [[ -t 1 ]]; then bold=$'\e[1m' plain=$'\e[0m'; else bold='' plain=''; fi

say() { printf '%s%s%s\n' "$bold" "$*" "$plain"; }
fail() { printf '%s: %s\n' "${0##*/}" "$*" >&2; exit 1; }
have() { command -v "$1" >/dev/null 2>&1; }
skip() { printf 'SKIP %s\n' "$*" >&2; }

# Tools of the administrator, and a toolchain installed by rustup, are often not on PATH.
PATH="$PATH:/usr/sbin:/sbin:${CARGO_HOME:-${HOME:-/root}/.cargo}/bin"

# A Rust toolchain new enough for the workspace, or a word on how to get one.
need_rust() {
    local want version
    want=$(sed -n 's/^rust-version = "\(.*\)"/\1/p' Cargo.toml)
    if ! have cargo || ! version=$(cargo --version 2>/dev/null); then
        cat >&2 <<END
${0##*/}: there is no Rust toolchain (cargo). Rust $want or newer is needed. Get it either way:
    your distribution, if it is new enough:   apt-get install cargo rustc    (or: apt-get install rustup && rustup default stable)
    the Rust project's installer:             https://rustup.rs
END
        exit 1
    fi
    version=$(cut -d' ' -f2 <<<"$version")
    if [[ $(printf '%s\n' "$want" "$version" | sort -V | head -1) != "$want" ]]; then
        fail "cargo $version is too old, $want or newer is needed: rustup update stable, or see https://rustup.rs"
    fi
    if ! have cc; then
        install_packages gcc libc6-dev
        have cc || fail "there is no C compiler to link with: install gcc (Debian: apt-get install gcc libc6-dev)"
    fi
}

# install_packages NAME...: by apt where this is Debian and we are root; otherwise the caller finds out what is missing.
install_packages() {
    (($# > 0)) || return 0
    if ! have apt-get || ((EUID != 0)); then
        printf '%s: cannot install (needs apt-get and root): %s\n' "${0##*/}" "$*" >&2
        return 0
    fi
    say "installing $*"
    local log
    log=$(mktemp)
    if ! { apt-get update && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends "$@"; } \
        >"$log" 2>&1 </dev/null; then
        tail -5 "$log" >&2
        printf '%s: apt-get could not install: %s\n' "${0##*/}" "$*" >&2
    fi
    rm -f "$log"
}

# install_tools TOOL:PACKAGE...: the packages of the tools that are absent.
install_tools() {
    local pair packages=()
    for pair in "$@"; do
        have "${pair%%:*}" || packages+=("${pair#*:}")
    done
    if ((${#packages[@]} > 0)); then
        mapfile -t packages < <(printf '%s\n' "${packages[@]}" | sort -u)
        install_packages "${packages[@]}"
    fi
}
