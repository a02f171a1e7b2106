//! The object: committed, so that building lbridge needs no eBPF toolchain. `cargo xtask build-ebpf` makes it.

use std::{borrow::Cow, env, fs, path::PathBuf};

use anyhow::Context as _;

static COMMITTED: &[u8] = aya::include_bytes_aligned!("../../bpf/lbridge.bpf.o");

/// Names another object file: for development.
const OVERRIDE: &str = "LBRIDGE_BPF_OBJECT";

/// The object's bytes.
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

/// What a map must look like to be adopted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Shape {
    pub(super) kind: u32,
    pub(super) key_size: u32,
    pub(super) value_size: u32,
    pub(super) max_entries: u32,
}

/// The shapes of the maps in `object`, by name.
pub(super) fn shapes(object: &[u8]) -> anyhow::Result<Vec<(String, Shape)>> {
    let object = aya_obj::Object::parse(object).context("the eBPF object cannot be understood")?;
    let shape = |map: &aya_obj::Map| Shape {
        kind: map.map_type(),
        key_size: map.key_size(),
        value_size: map.value_size(),
        max_entries: map.max_entries(),
    };
    Ok(object.maps.iter().map(|(name, map)| (name.clone(), shape(map))).collect())
}
