# Makes the work pools, and the deployments of containers/prefect.yaml; run it in the project's folder. What is there is brought up to date.
set -eu
prefect work-pool create flexsink --type process --overwrite
prefect work-pool create flexsink-docker --type docker --overwrite
prefect --no-prompt deploy --all --prefect-file containers/prefect.yaml
