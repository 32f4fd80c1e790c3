#!/bin/sh
# Install torch $TORCH with $PIP: the CPU build where there is no NVIDIA GPU, which saves gigabytes.
set -eu
quiet="--quiet --disable-pip-version-check"

# A wheel that pip's own configuration points at (find-links) needs no download at all.
if $PIP install $quiet --no-index --no-deps "torch==$TORCH" 2>/dev/null; then
    exit 0
fi
if [ "$(uname -s)" = Linux ] && ! command -v nvidia-smi >/dev/null 2>&1; then
    if $PIP install $quiet --retries 1 --index-url https://download.pytorch.org/whl/cpu "torch==$TORCH"; then
        exit 0
    fi
    echo "the index of CPU builds cannot be reached: installing torch $TORCH from the default one" >&2
fi
$PIP install $quiet "torch==$TORCH"
