# Files are in place. $1: how many versions of the package are installed, this one included.
if command -v systemd-sysusers >/dev/null; then
    systemd-sysusers lbridge.conf || :
fi
if command -v systemctl >/dev/null; then
    if [ "$1" -eq 1 ]; then
        # What the distribution's presets say, which on most is not to enable it.
        systemctl --no-reload preset lbridge.service || :
    fi
    if [ -d /run/systemd/system ]; then
        systemctl daemon-reload || :
        # One restart, not a stop and a start: systemd keeps the relays' listening sockets through it.
        [ "$1" -eq 1 ] || systemctl try-restart lbridge.service || :
    fi
fi
