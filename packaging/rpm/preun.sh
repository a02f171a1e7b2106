# $1: how many versions of the package will be left.
if [ "$1" -eq 0 ]; then
    if [ -d /run/systemd/system ]; then
        systemctl --no-reload disable --now lbridge.service || :
    fi
    # The kernel goes on with what is in force without the daemon, but not without the package.
    /usr/bin/lbridge service cleanup || :
fi
