# Completion of lbridge for fish: asks `lbridge complete` for the candidates.

function __lbridge_complete
    set -l before (commandline --tokenize --current-process --cut-at-cursor)
    set -l current (commandline --current-token --cut-at-cursor)
    set -l found (command lbridge complete -- $before "$current" 2>/dev/null)
    # One slash stands for files.
    if test "$found[1]" = /
        set -l option (string match --regex -- '^--[^=]+=' "$current"; or echo)
        set -l path (string sub --start (math 1 + (string length -- "$option")) -- "$current")
        for found in (__fish_complete_path "$path")
            echo $option$found
        end
    else
        string join \n -- $found
    end
end

complete --command lbridge --no-files --arguments '(__lbridge_complete)'
