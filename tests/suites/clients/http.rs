//! Apache and curl.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::process::Command;

use anyhow::{Result, ensure};
use lbridge_tests::harness::scene::Scene;
use lbridge_tests::harness::suite::{Need, Test};
use lbridge_tests::tests;
use tempfile::TempDir;

use crate::bytes::bytes;
use lbridge_tests::harness::server::{self, Server};

/// Debian keeps it off a user's PATH.
const APACHE: &str = "/usr/sbin/apache2";

pub(crate) fn tests() -> Vec<Test> {
    tests![
        many_requests_over_one_connection: [Need::File(APACHE), Need::Program("curl")],
        chunked_bodies_both_ways: [Need::File(APACHE), Need::Program("curl")],
        body_waits_for_100_continue: [Need::File(APACHE), Need::Program("curl")],
        a_hundred_mebibytes_down_and_up: [Need::File(APACHE), Need::Program("curl")],
    ]
}

struct Apache {
    scene: Scene,
    _server: Server,
    folder: TempDir,
}

impl Apache {
    /// Serves and takes (WebDAV) the files in `folder`; `/echo` answers with the request's body.
    fn start() -> Result<Apache> {
        let scene = Scene::new()?;
        let folder = server::folder()?;
        let root = folder.path().display();
        let modules = ["mpm_prefork", "authz_core", "alias", "dav", "dav_fs", "cgi"]
            .map(|name| format!("LoadModule {name}_module /usr/lib/apache2/modules/mod_{name}.so"))
            .join("\n");
        let configuration = format!(
            "{modules}
ServerName lab
Listen 127.0.0.1:8080
PidFile {root}/pid
DefaultRuntimeDir {root}
ErrorLog {root}/errors
User nobody
Group nogroup
MaxKeepAliveRequests 0
DocumentRoot {root}/files
ScriptAlias /echo {root}/echo
DavLockDB {root}/locks
<Directory {root}/files>
  Require all granted
  Dav on
</Directory>
<Location /forbidden>
  Require all denied
</Location>
"
        );
        let path = server::file_of(folder.path(), "conf", configuration.as_bytes())?;
        let script = "#!/bin/sh\nprintf 'Content-Type: application/octet-stream\\r\\n\\r\\n'\n\
                      /bin/cat > body\n/bin/cat body\n";
        let script = server::file_of(folder.path(), "echo", script.as_bytes())?;
        fs::set_permissions(script, fs::Permissions::from_mode(0o755))?;
        let files = folder.path().join("files");
        fs::create_dir(&files)?;
        std::os::unix::fs::chown(&files, Some(65534), Some(65534))?;
        let mut command = scene.lab.host().command(APACHE);
        command.arg("-d").arg(folder.path()).arg("-f").arg(path).args(["-e", "info", "-D", "FOREGROUND"]);
        let server = Server::start("apache", command, scene.lab.host(), "127.0.0.1:8080".parse()?)?;
        scene.allow(&["8080", "--path", "relay"])?;
        scene.must_be(8080, "relayed")?;
        Ok(Apache { scene, _server: server, folder })
    }

    fn file(&self, name: &str) -> std::path::PathBuf {
        self.folder.path().join("files").join(name)
    }

    /// curl in the container.
    fn curl(&self, arguments: &[&str], path: &str) -> Command {
        let mut command = self.scene.container.command("curl");
        command.args(["--silent", "--show-error", "--fail", "--max-time", "50", "--no-buffer"]);
        command.args(arguments).arg(format!("http://10.7.0.1:8080{path}"));
        command
    }

    /// Returns what `curl --verbose` says of headers and connections, and the body that it wrote.
    fn verbose(&self, arguments: &[&str], path: &str) -> Result<(String, Vec<u8>)> {
        let mut curl = self.curl(&["--verbose"], path);
        let output = server::output(curl.args(arguments))?;
        let said = String::from_utf8_lossy(&output.stderr).to_ascii_lowercase();
        ensure!(output.status.success(), "{}: {said}", output.status);
        Ok((said, output.stdout))
    }
}

fn many_requests_over_one_connection() -> Result<()> {
    const REQUESTS: usize = 1000;
    let apache = Apache::start()?;
    let body = bytes(1999);
    fs::write(apache.file("page"), &body)?;
    let out = apache.folder.path().join("out");
    fs::create_dir(&out)?;
    let each = out.join("#1").display().to_string();
    let connects = server::line(
        &mut apache
            .curl(&["--output", &each, "--write-out", "%{num_connects} "], &format!("/page?[1-{REQUESTS}]")),
    )?;
    let connects: Vec<_> = connects.split_whitespace().collect();
    ensure!(connects.len() == REQUESTS && connects[0] == "1", "{connects:?}");
    ensure!(connects[1..].iter().all(|&new| new == "0"), "one connection for all: {connects:?}");
    for number in 1..=REQUESTS {
        ensure!(fs::read(out.join(number.to_string()))? == body, "answer {number} differs");
    }
    let rule = apache.scene.daemon.rule("bridge:lab0", 8080)?;
    let served = rule.and_then(|rule| rule["gateways"][0]["connections"].as_u64());
    ensure!(served == Some(1), "connections: {served:?}");
    Ok(())
}

fn chunked_bodies_both_ways() -> Result<()> {
    let apache = Apache::start()?;
    let body = bytes(20_000_003);
    let source = server::file_of(apache.folder.path(), "source", &body)?.display().to_string();
    let (said, _) =
        apache.verbose(&["--upload-file", &source, "--header", "Transfer-Encoding: chunked"], "/up")?;
    ensure!(said.contains("> transfer-encoding: chunked"), "{said}");
    ensure!(!said.contains("> content-length"), "{said}");
    ensure!(fs::read(apache.file("up"))? == body, "the upload differs");

    // A script's answer has no length. It takes all in first: Apache reads nothing of it before.
    let data = format!("@{source}");
    let chunked = ["--data-binary", &data, "--header", "Transfer-Encoding: chunked"];
    let (said, back) = apache.verbose(&chunked, "/echo")?;
    ensure!(
        said.contains("> transfer-encoding: chunked") && said.contains("< transfer-encoding: chunked"),
        "{said}"
    );
    ensure!(back == body, "{} bytes came back", back.len());
    Ok(())
}

fn body_waits_for_100_continue() -> Result<()> {
    let apache = Apache::start()?;
    let body = bytes(3_000_000);
    let source = server::file_of(apache.folder.path(), "source", &body)?.display().to_string();
    // A curl that waited in vain would send the body after a while.
    let expect = ["--upload-file", &source, "--header", "Expect: 100-continue", "--expect100-timeout", "40"];
    let (said, _) = apache.verbose(&expect, "/up")?;
    ensure!(said.contains("< http/1.1 100 continue"), "{said}");
    ensure!(fs::read(apache.file("up"))? == body, "the upload differs");

    let mut refused = apache.curl(&expect, "/forbidden");
    let refused = server::output(refused.args(["--write-out", "%{http_code} %{size_upload}"]))?;
    let told = String::from_utf8_lossy(&refused.stdout);
    ensure!(told.ends_with("403 0"), "refused before the body was sent: {refused:?}");
    Ok(())
}

fn a_hundred_mebibytes_down_and_up() -> Result<()> {
    let apache = Apache::start()?;
    let body = bytes(100 << 20);
    fs::write(apache.file("down"), &body)?;
    let out = apache.folder.path().join("out").display().to_string();
    server::printed(&mut apache.curl(&["--output", &out], "/down"))?;
    // Byte for byte, which is more than a hash.
    ensure!(fs::read(&out)? == body, "the download differs");
    server::printed(&mut apache.curl(&["--upload-file", &out], "/up"))?;
    ensure!(fs::read(apache.file("up"))? == body, "the upload differs");
    Ok(())
}
