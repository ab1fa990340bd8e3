# Sourced by quickstart.sh and test.sh from the root of the repository: prepare_env [EXTRA] makes .venv.
# It installs anew only when the requirements, the place of the clone or the asked extra changed.

find_python() {
    local candidate
    for candidate in ${PYTHON:-python3 python3.13 python3.12 python3.11 python}; do
        if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            echo "$candidate"
            return
        fi
    done
    echo "effitrain needs Python 3.11 or newer; found: $(${PYTHON:-python3} --version 2>&1 | tail -n 1)" >&2
    echo "Install one and try again, or name it: PYTHON=/path/to/python3.11 bash $0" >&2
    return 1
}

prepare_env() {
    local extra="${1:-}" key python
    key="$({ pwd && cat constraints.txt setup.py pyproject.toml; } | sha256sum)"
    if [[ -x .venv/bin/python ]] && grep -qsxF "$key" ".venv/installed-${extra:-base}" .venv/installed-test; then
        return
    fi
    if ! .venv/bin/python -m pip --version >/dev/null 2>&1; then
        python="$(find_python)"
        "$python" -m venv --clear .venv
    fi
    echo "Installing effitrain${extra:+ with its $extra tools} into .venv, about three minutes the first time." >&2
    .venv/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".${extra:+[$extra]}"
    echo "$key" >".venv/installed-${extra:-base}"
}
