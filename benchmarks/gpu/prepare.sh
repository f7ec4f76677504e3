#!/usr/bin/env bash
# Lays out what a machine with a GPU, Python 3.12 and torch, but no package registry, lacks: wheels into .whl, and Omniglot
# into .dev. Run it in the project's root, copy the root with both folders there, and run: bash benchmarks/gpu/first.sh
#   bash benchmarks/gpu/prepare.sh [OMNIGLOT_ZIP]
set -euo pipefail
omniglot=${1:-../shared/data/omniglot-py.zip}
mkdir -p .whl .dev
platforms=()
for p in manylinux_2_28 manylinux_2_27 manylinux_2_17 manylinux2014 manylinux1; do platforms+=(--platform "${p}_x86_64"); done
wheels() {
  python3 -m pip download --quiet --no-deps --only-binary=:all: --python-version 3.12 --implementation cp "${platforms[@]}" -d .whl "$@"
}
wheels rich pydantic annotated-types typing-inspection "filelock>=4" jinja2 markupsafe
core=$(unzip -p .whl/pydantic-*.whl '*/METADATA' | sed -n 's/^Requires-Dist: pydantic-core==//p')
wheels "pydantic-core==$core"
ls .whl/higher-*.whl >/dev/null 2>&1 || python3 -m pip wheel --quiet --no-deps -w .whl higher
cp "$omniglot" .dev/omniglot-py.zip
du -sh .whl .dev
