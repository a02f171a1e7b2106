//! Object: committed, so that building lbridge needs no eBPF toolchain. `cargo xtask build-ebpf` makes it.

use std::{borrow::Cow, env, fs, path::PathBuf};

use anyhow::Context as _;
use aya_obj::generated::{bpf_attach_type, bpf_map_type};
use lbridge_common::symbols;

static COMMITTED: &[u8] = aya::include_bytes_aligned!("../../bpf/lbridge.bpf.o");

/// Environment variable that names another object file, for development.
const OVERRIDE: &str = "LBRIDGE_BPF_OBJECT";

/// Returns the object's bytes.
pub(super) fn bytes() -> anyhow::Result<Cow<'static, [u8]>> {
    match env::var_os(OVERRIDE).map(PathBuf::from) {
        None => Ok(Cow::Borrowed(COMMITTED)),
        Some(path) => {
            let bytes =
                fs::read(&path).with_context(|| format!("{OVERRIDE}: cannot read {}", path.display()))?;
            Ok(Cow::Owned(bytes))
        }
    }
}

/// Properties that a map must have to be adopted; sizes in bytes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Shape {
    pub(super) kind: u32,
    pub(super) key_size: u32,
    pub(super) value_size: u32,
    pub(super) max_entries: u32,
}

/// Lists the shapes of the maps in `object`, by name.
pub(super) fn shapes(object: &[u8]) -> anyhow::Result<Vec<(String, Shape)>> {
    let object = aya_obj::Object::parse(object).context("cannot parse the eBPF object")?;
    let shape = |map: &aya_obj::Map| Shape {
        kind: map.map_type(),
        key_size: map.key_size(),
        value_size: map.value_size(),
        max_entries: map.max_entries(),
    };
    Ok(object.maps.iter().map(|(name, map)| (name.clone(), shape(map))).collect())
}

/// A program of the object: its hook, and the maps that identify the program in any version.
#[derive(Debug)]
pub(super) struct Known {
    /// Full name in the object, which the kernel cuts to [`NAME_LENGTH`] bytes.
    pub(super) name: &'static str,
    /// Hook that the program is attached to.
    pub(super) hook: bpf_attach_type,
    /// Sets of maps. In every version the program uses all maps of one of these sets.
    pub(super) maps: &'static [&'static [&'static str]],
}

/// Every program that a version of lbridge attaches.
pub(super) const PROGRAMS: [Known; 14] = {
    use bpf_attach_type::{
        BPF_CGROUP_INET4_CONNECT, BPF_CGROUP_INET4_GETPEERNAME, BPF_CGROUP_INET4_GETSOCKNAME,
        BPF_CGROUP_INET6_CONNECT, BPF_CGROUP_INET6_GETPEERNAME, BPF_CGROUP_INET6_GETSOCKNAME,
        BPF_CGROUP_SOCK_OPS, BPF_CGROUP_UDP4_SENDMSG, BPF_CGROUP_UDP6_SENDMSG, BPF_SK_LOOKUP,
    };
    use symbols::{
        ANNOUNCE, CONNECT4, CONNECT6, ENTRIES, LISTENERS, LOOPBACK_NAMES, PEERNAME4, PEERNAME6,
        REDIRECT_NETNS, REDIRECTS, REGISTER, RELAY_PEERS, REPLY_SOURCES, REPLY4, REPLY6, SOCKNAME4,
        SOCKNAME6, STEER, STEER_ANY_INTERFACE, TARGETS,
    };
    const fn known(
        name: &'static str,
        hook: bpf_attach_type,
        maps: &'static [&'static [&'static str]],
    ) -> Known {
        Known { name, hook, maps }
    }
    [
        known(STEER, BPF_SK_LOOKUP, &[&[ENTRIES, LISTENERS], &["RULES", LISTENERS]]),
        known(STEER_ANY_INTERFACE, BPF_SK_LOOKUP, &[&[ENTRIES, LISTENERS], &["RULES", LISTENERS]]),
        known(REGISTER, BPF_CGROUP_SOCK_OPS, &[&[TARGETS, LISTENERS]]),
        known(ANNOUNCE, BPF_CGROUP_SOCK_OPS, &[&[TARGETS, RELAY_PEERS]]),
        known(
            PEERNAME4,
            BPF_CGROUP_INET4_GETPEERNAME,
            &[&["LOOPBACK_VIEWS", RELAY_PEERS], &[LOOPBACK_NAMES, RELAY_PEERS]],
        ),
        known(
            PEERNAME6,
            BPF_CGROUP_INET6_GETPEERNAME,
            &[&["LOOPBACK_VIEWS", RELAY_PEERS], &[LOOPBACK_NAMES, RELAY_PEERS]],
        ),
        known(SOCKNAME4, BPF_CGROUP_INET4_GETSOCKNAME, &[&["LOOPBACK_VIEWS"], &[LOOPBACK_NAMES]]),
        known(SOCKNAME6, BPF_CGROUP_INET6_GETSOCKNAME, &[&["LOOPBACK_VIEWS"], &[LOOPBACK_NAMES]]),
        known(CONNECT4, BPF_CGROUP_INET4_CONNECT, &[&[REDIRECT_NETNS, REDIRECTS], &["GUESTS", "DIALS"]]),
        known(CONNECT6, BPF_CGROUP_INET6_CONNECT, &[&[REDIRECT_NETNS, REDIRECTS], &["GUESTS", "DIALS"]]),
        known(REPLY4, BPF_CGROUP_UDP4_SENDMSG, &[&[REPLY_SOURCES], &["REPLIES"]]),
        known(REPLY6, BPF_CGROUP_UDP6_SENDMSG, &[&[REPLY_SOURCES], &["REPLIES"]]),
        // Before ABI version 4.
        known("dial4", BPF_CGROUP_INET4_CONNECT, &[&["GUESTS", "DIALS"]]),
        known("dial6", BPF_CGROUP_INET6_CONNECT, &[&["GUESTS", "DIALS"]]),
    ]
};

/// Bytes after which the kernel cuts a name (`BPF_OBJ_NAME_LEN`, include/uapi/linux/bpf.h, less a zero).
pub(super) const NAME_LENGTH: usize = 15;

impl Known {
    /// Finds the program of this name, as the kernel reports it.
    pub(super) fn of_name(name: &[u8]) -> Option<&'static Self> {
        let cut = |known: &&Self| &known.name.as_bytes()[..known.name.len().min(NAME_LENGTH)] == name;
        PROGRAMS.iter().find(cut)
    }
}

/// Returns true if a map is one of those in [`Known::maps`] as some version has made it, judging by its name,
/// kind and key size.
pub(super) fn is_known_map(name: &[u8], kind: u32, key_size: u32) -> bool {
    KNOWN_MAPS.iter().any(|(known, its_kind, its_key_size, _)| {
        known.as_bytes() == name && *its_kind as u32 == kind && *its_key_size == key_size
    })
}

/// The maps of [`Known::maps`] as every version made them: the name, the kind, a key's size in bytes, and the
/// first ABI version with that. A change adds a line and removes none: a daemon uses these lines to find what
/// an older one has left attached.
const KNOWN_MAPS: [(&str, bpf_map_type, u32, u32); 17] = {
    use bpf_map_type::{
        BPF_MAP_TYPE_HASH, BPF_MAP_TYPE_LPM_TRIE, BPF_MAP_TYPE_SK_STORAGE, BPF_MAP_TYPE_SOCKHASH,
    };
    [
        ("RULES", BPF_MAP_TYPE_HASH, 24, 1),
        (symbols::ENTRIES, BPF_MAP_TYPE_HASH, 24, 4),
        (symbols::LISTENERS, BPF_MAP_TYPE_SOCKHASH, 20, 1),
        (symbols::TARGETS, BPF_MAP_TYPE_HASH, 2, 1),
        (symbols::TARGETS, BPF_MAP_TYPE_HASH, 4, 2),
        (symbols::TARGETS, BPF_MAP_TYPE_HASH, 20, 3),
        ("LOOPBACK_VIEWS", BPF_MAP_TYPE_HASH, 20, 1),
        ("LOOPBACK_VIEWS", BPF_MAP_TYPE_LPM_TRIE, 40, 2),
        (symbols::LOOPBACK_NAMES, BPF_MAP_TYPE_SK_STORAGE, 4, 3),
        (symbols::RELAY_PEERS, BPF_MAP_TYPE_HASH, 20, 1),
        (symbols::RELAY_PEERS, BPF_MAP_TYPE_HASH, 40, 3),
        ("GUESTS", BPF_MAP_TYPE_HASH, 8, 2),
        (symbols::REDIRECT_NETNS, BPF_MAP_TYPE_HASH, 8, 4),
        ("DIALS", BPF_MAP_TYPE_HASH, 32, 2),
        (symbols::REDIRECTS, BPF_MAP_TYPE_HASH, 32, 4),
        ("REPLIES", BPF_MAP_TYPE_LPM_TRIE, 40, 2),
        (symbols::REPLY_SOURCES, BPF_MAP_TYPE_LPM_TRIE, 40, 4),
    ]
};

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_objects_maps_are_known() {
        let shapes = shapes(COMMITTED).unwrap();
        assert!(KNOWN_MAPS.iter().all(|(.., since)| *since <= lbridge_common::wire::ABI_VERSION));
        let shape = |name: &str| Some(&shapes.iter().find(|(map, _)| map == name)?.1);
        let object = aya_obj::Object::parse(COMMITTED).unwrap();
        for program in PROGRAMS.iter().filter(|program| object.programs.contains_key(program.name)) {
            let todays = |set: &&&[&str]| set.iter().all(|name| shape(name).is_some());
            let set = program.maps.iter().find(todays);
            let set = set.unwrap_or_else(|| panic!("{}: no set of maps of this version", program.name));
            for name in *set {
                let shape = shape(name).unwrap();
                assert!(
                    is_known_map(name.as_bytes(), shape.kind, shape.key_size),
                    "KNOWN_MAPS lacks {name} as it is now ({shape:?})"
                );
            }
        }
    }

    #[test]
    fn the_objects_programs_are_known() {
        let object = aya_obj::Object::parse(COMMITTED).unwrap();
        for name in object.programs.keys() {
            let cut = &name.as_bytes()[..name.len().min(NAME_LENGTH)];
            assert_eq!(Known::of_name(cut).map(|known| known.name), Some(name.as_str()));
        }
        assert!(Known::of_name(b"steer_").is_none());
    }
}
