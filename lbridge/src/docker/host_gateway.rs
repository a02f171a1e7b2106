//! `host-gateway`: reads the addresses that dockerd was configured to write for it into containers' hosts
//! files, from dockerd's configuration and command line. Its API does not report them.

use std::{
    fs::{self, OpenOptions},
    io::Read as _,
    net::IpAddr,
    os::unix::fs::{MetadataExt as _, OpenOptionsExt as _},
    path::{Path, PathBuf},
};

const CONFIGURATION: &str = "/etc/docker/daemon.json";
const FLAG: &str = "host-gateway-ip";
const CONFIGURATION_FLAG: &str = "config-file";
/// The most bytes that are read of a configuration file; a longer one is cut off, and so counts as invalid.
const LONGEST: u64 = 1 << 20;

/// Lists the configured addresses. Reads the command line of root's dockerd that shares this process's
/// network and pid namespaces, and the configuration file that it names. Without such a dockerd, reads the
/// configuration at its usual place.
pub(super) fn configured_addresses() -> Vec<IpAddr> {
    let arguments = command_line().unwrap_or_default();
    let file = values(&arguments, CONFIGURATION_FLAG).pop().map(PathBuf::from);
    let mut told = addresses(values(&arguments, FLAG).iter().map(String::as_str));
    let file = read(file.as_deref().unwrap_or(Path::new(CONFIGURATION)));
    told.extend(file.map(|text| configured(&text)).unwrap_or_default());
    told.sort();
    told.dedup();
    told
}

/// Reads the text of a regular file; `None` if it is something else. A command line may name any file: a
/// device may be endless, or act when it is opened; a FIFO would block.
fn read(path: &Path) -> Option<String> {
    fs::metadata(path).ok().filter(fs::Metadata::is_file)?;
    let file = OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK).open(path).ok()?;
    file.metadata().ok().filter(fs::Metadata::is_file)?;
    let mut text = String::new();
    file.take(LONGEST).read_to_string(&mut text).ok()?;
    Some(text)
}

fn command_line() -> Option<Vec<String>> {
    let own = ["net", "pid"].map(|kind| namespace(Path::new("/proc/self"), kind));
    fs::read_dir("/proc").ok()?.filter_map(Result::ok).find_map(|entry| {
        let process = entry.path();
        // Any user may run a program of this name, and a container may have an engine of its own, or the
        // host's network.
        let is_roots = fs::metadata(&process).ok()?.uid() == 0;
        let is_dockerd = fs::read_to_string(process.join("comm")).ok()? == "dockerd\n";
        let is_here = || ["net", "pid"].map(|kind| namespace(&process, kind)) == own;
        if !is_roots || !is_dockerd || own.contains(&None) || !is_here() {
            return None;
        }
        let line = fs::read(process.join("cmdline")).ok()?;
        Some(line.split(|b| *b == 0).map(|word| String::from_utf8_lossy(word).into_owned()).collect())
    })
}

/// Returns device and inode of a process's namespace of this kind.
fn namespace(process: &Path, kind: &str) -> Option<(u64, u64)> {
    let namespace = fs::metadata(process.join("ns").join(kind)).ok()?;
    Some((namespace.dev(), namespace.ino()))
}

/// Lists all values of a flag, given as `--flag VALUE` or `--flag=VALUE`.
fn values(arguments: &[String], flag: &str) -> Vec<String> {
    let named =
        |word: &str| word.strip_prefix("--").and_then(|word| word.strip_prefix(flag)).map(str::to_owned);
    let mut values = vec![];
    for (index, word) in arguments.iter().enumerate() {
        match named(word).as_deref() {
            Some("") => values.extend(arguments.get(index + 1).cloned()),
            Some(rest) => values.extend(rest.strip_prefix('=').map(str::to_owned)),
            None => {}
        }
    }
    values
}

/// Reads `host-gateway-ip`, and the list that newer versions accept (`host-gateway-ips`).
fn configured(text: &str) -> Vec<IpAddr> {
    let Ok(file) = serde_json::from_str::<serde_json::Value>(text) else { return vec![] };
    let listed = file["host-gateway-ips"].as_array().into_iter().flatten();
    addresses(listed.chain([&file[FLAG]]).filter_map(serde_json::Value::as_str))
}

fn addresses<'a>(texts: impl Iterator<Item = &'a str>) -> Vec<IpAddr> {
    texts.flat_map(|text| text.split(',')).filter_map(|text| text.trim().parse().ok()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ips(texts: &[&str]) -> Vec<IpAddr> {
        texts.iter().map(|text| text.parse().unwrap()).collect()
    }

    #[test]
    fn a_command_line_is_read() {
        let line =
            ["dockerd", "--host-gateway-ip=10.0.0.5", "--host-gateway-ip", "10.0.0.6,fd00::6", "--host"];
        let line: Vec<_> = line.map(str::to_owned).into();
        let values = values(&line, FLAG);
        assert_eq!(addresses(values.iter().map(String::as_str)), ips(&["10.0.0.5", "10.0.0.6", "fd00::6"]));
        assert!(super::values(&line, CONFIGURATION_FLAG).is_empty());
    }

    #[test]
    fn what_has_no_end_is_no_configuration() {
        let directory = tempfile::tempdir().unwrap();
        let path = |name: &str| directory.path().join(name);
        nix::unistd::mkfifo(&path("fifo"), nix::sys::stat::Mode::S_IRWXU).unwrap();
        fs::write(path("plain"), "{}").unwrap();
        for (file, text) in [
            (path("plain"), Some("{}")),
            (path("fifo"), None),
            ("/dev/zero".into(), None),
            (path("none"), None),
        ] {
            assert_eq!(read(&file).as_deref(), text, "{}", file.display());
        }
        fs::File::create(path("huge")).unwrap().set_len(1 << 40).unwrap();
        assert!(read(&path("huge")).is_none_or(|text| text.len() as u64 == LONGEST));
    }

    #[test]
    fn a_configuration_is_read() {
        assert_eq!(configured(r#"{"host-gateway-ip": "10.0.0.5", "debug": true}"#), ips(&["10.0.0.5"]));
        assert_eq!(
            configured(r#"{"host-gateway-ips": ["10.0.0.5", "fd00::5"]}"#),
            ips(&["10.0.0.5", "fd00::5"])
        );
        assert_eq!(configured(r#"{"bip": "172.17.0.1/16"}"#), ips(&[]));
        assert_eq!(configured("no JSON"), ips(&[]));
    }
}
