#!/bin/sh
# A fake adb, for tests without a phone: one "device" of serial number FAKE, which is this machine. It says so.
# FAKE_ADB_CUT, a number of bytes: a push breaks off there, once, as when the cable is pulled.
[ "$1" = version ] && { echo "a fake adb, not Android's"; exit 0; }
[ "$1" = -s ] || { echo "adb: fake adb: -s SERIAL comes first" >&2; exit 1; }
[ "$2" = FAKE ] || { echo "adb: device '$2' not found" >&2; exit 1; }
shift 2
verb=$1
shift
case $verb in
shell)
    while [ "$1" = -T ] || [ "$1" = -n ]; do shift; done
    exec sh -c "$*" </dev/null # adb, too, joins the words and leaves them to a shell
    ;;
push)
    if [ -n "$FAKE_ADB_CUT" ] && [ ! -e "$FAKE_ADB_CUT_DONE" ]; then
        : >"$FAKE_ADB_CUT_DONE"
        head -c "$FAKE_ADB_CUT" "$1" >"$2"
        echo "adb: error: failed to copy '$1' to '$2': device offline" >&2
        exit 1
    fi
    cp -- "$1" "$2" && echo "$1: 1 file pushed"
    ;;
*) echo "adb: fake adb knows no $verb" >&2; exit 1 ;;
esac
