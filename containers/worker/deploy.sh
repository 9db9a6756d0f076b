# Makes the work pools, and the deployments of containers/prefect.yaml; run it in the project's folder. What is there is brought up to date.
#     PREFECT_API_URL=http://127.0.0.1:4200/api sh containers/worker/deploy.sh
# FLEXSINK_HOME is the project's folder on the worker's machine, this one where it is not set.
set -eu
: "${PREFECT_API_URL:?set it to the address of a running server, such as http://127.0.0.1:4200/api}"
export FLEXSINK_HOME="${FLEXSINK_HOME:-$PWD}"
command -v prefect > /dev/null || PATH=$PWD/.venv/bin:$PATH
prefect work-pool create flexsink --type process --overwrite
prefect work-pool create flexsink-docker --type docker --overwrite
prefect --no-prompt deploy --all --prefect-file containers/prefect.yaml
