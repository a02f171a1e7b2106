# Completion of lbridge for bash: asks `lbridge complete` for the candidates.

_lbridge() {
    # Bash splits words at the characters of COMP_WORDBREAKS, as in bridge:lab0 and 80=3000. Join what no blank
    # separates, up to the cursor.
    local line=${COMP_LINE:0:COMP_POINT} gap word i
    local -a words=()
    for ((i = 0; i <= COMP_CWORD; i++)); do
        gap=${line%%[![:space:]]*}
        line=${line#"$gap"}
        word=${COMP_WORDS[i]}
        ((i == COMP_CWORD)) && word=$line
        if [[ $i -eq 0 || -n $gap ]]; then
            words+=("$word")
        else
            words[-1]+=$word
        fi
        line=${line#"$word"}
    done
    local current=${words[-1]}

    local -a found=()
    mapfile -t found < <(command lbridge complete -- "${words[@]}" 2>/dev/null)

    # One slash stands for files, which bash knows best how to quote.
    if [[ ${found[0]-} == / ]]; then
        compopt -o filenames 2>/dev/null
        [[ $current == --*=* ]] && current=${current#*=}
        mapfile -t COMPREPLY < <(compgen -f -- "$current")
        return
    fi

    # Bash replaces only what follows the last break in the current word.
    local before=
    if [[ $current == *[:=]* ]]; then
        local last=${current##*[:=]}
        local head=${current%"$last"}
        [[ $COMP_WORDBREAKS == *"${head: -1}"* ]] && before=$head
    fi
    COMPREPLY=()
    for word in "${found[@]}"; do
        word=${word%%$'\t'*}
        COMPREPLY+=("${word#"$before"}")
    done
}

complete -F _lbridge lbridge
