#!/bin/sh
# Start a Ray head that only this machine reaches. Further options go to `ray start`.
set -eu
# The jobs API runs any code it is sent (CVE-2023-48022): loopback keeps other machines out, the token other users.
export RAY_AUTH_MODE=token
# --node-ip-address 127.0.0.1 alone does nothing: Ray replaces it by an address that other machines reach, unless this
# is 0, and its servers listen on all interfaces.
export RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER="${RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER:-0}"
# A busy machine takes longer to start a raylet and its agent than Ray waits by default before it gives up.
export RAY_raylet_start_wait_time_s="${RAY_raylet_start_wait_time_s:-300}"
export RAY_agent_register_timeout_ms="${RAY_agent_register_timeout_ms:-300000}"
# Under `uv run` every worker would run uv again.
export RAY_ENABLE_UV_RUN_RUNTIME_ENV=0
[ -e "${HOME}/.ray/auth_token" ] || ray get-auth-token --generate >/dev/null
exec ray start --head --node-ip-address 127.0.0.1 --dashboard-host 127.0.0.1 "$@"
