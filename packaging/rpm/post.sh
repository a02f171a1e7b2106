# The files are installed. $1: the number of installed versions of the package, including this one.
if command -v systemd-sysusers >/dev/null; then
    systemd-sysusers lbridge.conf || :
fi
if command -v systemctl >/dev/null; then
    if [ "$1" -eq 1 ]; then
        # Follows the distribution's presets, most of which do not enable the unit.
        systemctl --no-reload preset lbridge.service || :
    fi
    if [ -d /run/systemd/system ]; then
        systemctl daemon-reload || :
        # One restart, not a stop and a start: systemd keeps the relays' listening sockets through it.
        [ "$1" -eq 1 ] || systemctl try-restart lbridge.service || :
    fi
fi
