#!/usr/bin/env bash
# Print a file of cluster/ with its images pinned by digest, for kubectl or `ray up`:
#   cluster/pin.sh REGISTRY/quorum@sha256:GPU REGISTRY/quorum@sha256:CPU cluster/kuberay/rayjob.yaml | kubectl create -f -
set -euo pipefail

if [[ $# -ne 3 ]]; then
    echo "usage: cluster/pin.sh GPU_IMAGE@sha256:DIGEST CPU_IMAGE@sha256:DIGEST FILE" >&2
    exit 2
fi
for image in "$1" "$2"; do
    if [[ ! $image =~ ^[a-z0-9][a-z0-9._:/-]*@sha256:[0-9a-f]{64}$ ]]; then
        echo "$image is not pinned by digest; use the NAME@sha256:… that 'docker push' prints" >&2
        exit 2
    fi
done
pinned=$(sed -E "s#(image: )REGISTRY/quorum:[0-9.]+-gpu#\1$1#; s#(image: )REGISTRY/quorum:[0-9.]+-cpu#\1$2#" "$3")
if left=$(grep -E '^ *(- )?image: ' <<< "$pinned" | grep -v '@sha256:'); then
    echo "$3 has images of other names; pin them in the file:" >&2
    echo "$left" >&2
    exit 2
fi
printf '%s\n' "$pinned"
