# $1: the number of versions of the package that will remain.
if [ "$1" -eq 0 ]; then
    if [ -d /run/systemd/system ]; then
        systemctl --no-reload disable --now lbridge.service || :
    fi
    # The kernel keeps rules in force without the daemon, but they must end with the package.
    /usr/bin/lbridge service cleanup || :
fi
