//! What dockerd writes for `host-gateway` in a container's hosts, if it was told: its configuration and its command line say. It
//! tells nobody who asks its API.

use std::{
    fs,
    net::IpAddr,
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
};

const CONFIGURATION: &str = "/etc/docker/daemon.json";
const FLAG: &str = "host-gateway-ip";
const CONFIGURATION_FLAG: &str = "config-file";

/// Of root's dockerd that shares this network namespace; while there is none, of its configuration's usual place.
pub(super) fn told() -> Vec<IpAddr> {
    let arguments = command_line().unwrap_or_default();
    let file = values(&arguments, CONFIGURATION_FLAG).pop().map(PathBuf::from);
    let mut told = addresses(values(&arguments, FLAG).iter().map(String::as_str));
    let file = fs::read_to_string(file.as_deref().unwrap_or(Path::new(CONFIGURATION)));
    told.extend(file.map(|text| configured(&text)).unwrap_or_default());
    told.sort();
    told.dedup();
    told
}

fn command_line() -> Option<Vec<String>> {
    let own = fs::metadata("/proc/self/ns/net").ok()?;
    fs::read_dir("/proc").ok()?.filter_map(Result::ok).find_map(|entry| {
        let process = entry.path();
        // Anybody may call a program so, and a container may have an engine of its own.
        let is_roots = fs::metadata(&process).ok()?.uid() == 0;
        let is_dockerd = fs::read_to_string(process.join("comm")).ok()? == "dockerd\n";
        let namespace = fs::metadata(process.join("ns/net")).ok().filter(|_| is_roots && is_dockerd)?;
        if (namespace.dev(), namespace.ino()) != (own.dev(), own.ino()) {
            return None;
        }
        let line = fs::read(process.join("cmdline")).ok()?;
        Some(line.split(|b| *b == 0).map(|word| String::from_utf8_lossy(word).into_owned()).collect())
    })
}

/// `--flag VALUE` and `--flag=VALUE`, as often as it is given.
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

/// `host-gateway-ip`, and the list that newer versions take.
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
