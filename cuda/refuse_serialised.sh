#!/bin/sh
# Runs the compiler given as arguments, and fails when ptxas tells that it serialised a wgmma or ignored a setmaxnreg
# (messages C7500 to C7599): the kernel would be right and several times slower, and ptxas calls that information.
messages=$("$@" 2>&1)
status=$?
[ -z "$messages" ] || printf '%s\n' "$messages" >&2
case $messages in
*"(C75"*)
  echo "refused: ptxas serialised a wgmma or ignored a setmaxnreg (C75xx above)" >&2
  exit 1
  ;;
esac
exit $status
