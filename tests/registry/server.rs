//! Debian's docker-registry, one process for a test.

use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

/// A registry with storage of its own. Dropping it ends it.
pub struct Server {
    process: Child,
    /// Host and port.
    pub address: String,
    _folder: tempfile::TempDir,
}

impl Server {
    /// Starts one on the loopback, open to all.
    pub fn start() -> Server {
        Server::configured("127.0.0.1:0", "", "")
    }

    /// Starts one with more lines under `http:`, and more at the top.
    pub fn configured(address: &str, http: &str, top: &str) -> Server {
        let folder = tempfile::tempdir().unwrap();
        let storage = folder.path().join("storage");
        let config = folder.path().join("config.yml");
        let lines = format!(
            "version: 0.1\n\
             log: {{ level: info, formatter: text, accesslog: {{ disabled: true }} }}\n\
             storage: {{ filesystem: {{ rootdirectory: {} }} }}\n\
             http:\n  addr: {address}\n  secret: test\n{http}\n{top}\n",
            storage.display()
        );
        std::fs::write(&config, lines).unwrap();
        let mut process = Command::new("docker-registry")
            .arg("serve")
            .arg(&config)
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .expect("docker-registry of Debian's docker-registry is needed");
        let address = listening(&mut process);
        Server {
            process,
            address,
            _folder: folder,
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.process.kill().unwrap();
        self.process.wait().unwrap();
    }
}

/// Reads the address from the log, which goes on being read, so that it never fills.
fn listening(process: &mut Child) -> String {
    let log = BufReader::new(process.stderr.take().unwrap());
    let (found, address) = std::sync::mpsc::channel();
    std::thread::spawn(move || {
        let mut seen = String::new();
        for line in log.lines().map_while(Result::ok) {
            if let Some((_, rest)) = line.split_once("listening on ") {
                let end = rest.find(['"', ',']).unwrap_or(rest.len());
                found.send(Ok(rest[..end].to_owned())).ok();
            }
            if seen.len() < 4000 {
                seen += &line;
                seen.push('\n');
            }
        }
        found.send(Err(seen)).ok();
    });
    match address.recv_timeout(Duration::from_secs(30)) {
        Ok(Ok(address)) => address,
        other => panic!("docker-registry does not listen: {other:?}"),
    }
}

/// A key and a certificate of its own, for `subject_alt_name`: `key.pem`, `cert.pem`.
pub fn certificate(folder: &Path, subject_alt_name: &str) {
    // A server's certificate: rustls takes none that may sign others.
    let config = format!(
        "[req]\ndistinguished_name = name\nprompt = no\nx509_extensions = server\n\
         [name]\nCN = vm-run-test\n\
         [server]\nbasicConstraints = CA:FALSE\nsubjectAltName = {subject_alt_name}\n"
    );
    std::fs::write(folder.join("openssl.cnf"), config).unwrap();
    let out = Command::new("openssl")
        .args(["req", "-x509", "-config", "openssl.cnf", "-days", "2"])
        .args(["-newkey", "rsa:2048", "-nodes"])
        .args(["-keyout", "key.pem", "-out", "cert.pem"])
        .current_dir(folder)
        .output()
        .expect("openssl of Debian's openssl is needed");
    assert!(
        out.status.success(),
        "{}",
        String::from_utf8_lossy(&out.stderr)
    );
}
