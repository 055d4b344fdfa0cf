//! Who may pull and push: passwords, tokens, certificates.

use super::http::{Answer, Http, Request};
use super::server::{Server, certificate};
use super::{command, good, layers, line, store_with, text, vm_run};
use base64::Engine;
use base64::engine::general_purpose::{STANDARD, URL_SAFE_NO_PAD};
use serde_json::json;
use std::io::Write;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::{Command, Output, Stdio};
use std::time::{SystemTime, UNIX_EPOCH};

const USER: &str = "me";
const PASSWORD: &str = "secret";
/// `htpasswd -Bbn -C 4 me secret`
const HTPASSWD: &str = "me:$2y$04$bqnzIz5Il1xf1Eh95gnt4.Rd2kHzBsBhmRFZI8JSmwwz1iNF7Qu0u\n";

/// A registry that knows one user.
fn with_password(folder: &Path) -> Server {
    let file = folder.join("htpasswd");
    std::fs::write(&file, HTPASSWD).unwrap();
    let auth = format!(
        "auth: {{ htpasswd: {{ realm: test, path: {} }} }}",
        file.display()
    );
    Server::configured("127.0.0.1:0", "", &auth)
}

fn as_user(root: &Path, args: &[&str], user: &str, password: &str) -> Output {
    let login = ["--username", user, "--password-stdin"];
    let mut child = command(root, &[args, &login].concat())
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut stdin = child.stdin.take().unwrap();
    stdin.write_all(format!("{password}\n").as_bytes()).unwrap();
    drop(stdin);
    child.wait_with_output().unwrap()
}

#[test]
fn a_password_opens_the_registry() {
    let folder = tempfile::tempdir().unwrap();
    let server = with_password(folder.path());
    let name = format!("{}/a:1", server.address);
    let first = store_with(&name, &layers());
    let root = tempfile::tempdir().unwrap();
    for refused in [
        vm_run(first.path(), &["push", &name]),
        vm_run(root.path(), &["pull", &name]),
        as_user(first.path(), &["push", &name], USER, "wrong"),
    ] {
        let line = line(&refused);
        assert!(line.contains("or not for you (log in with"), "{line}");
    }
    text(as_user(first.path(), &["push", &name], USER, PASSWORD));
    text(as_user(root.path(), &["pull", &name], USER, PASSWORD));
    let out = as_user(root.path(), &["pull", &name], USER, "");
    assert!(line(&out).contains("no password on standard input"));
}

/// Pulls `name` with this `config.json`, and with `folder` in the search path.
fn with_config(name: &str, config: &str, folder: &Path) -> Output {
    let root = tempfile::tempdir().unwrap();
    std::fs::write(folder.join("config.json"), config).unwrap();
    let path = std::env::var("PATH").unwrap();
    command(root.path(), &["pull", "-q", name])
        .env("DOCKER_CONFIG", folder)
        .env("PATH", format!("{}:{path}", folder.display()))
        .output()
        .unwrap()
}

#[test]
fn docker_s_configuration_is_read() {
    let folder = tempfile::tempdir().unwrap();
    let server = with_password(folder.path());
    let name = format!("{}/a:1", server.address);
    let first = store_with(&name, &layers());
    text(as_user(first.path(), &["push", &name], USER, PASSWORD));
    let auth = |user: &str| {
        let auth = STANDARD.encode(format!("{user}:{PASSWORD}"));
        json!({ "auths": { &server.address: { "auth": auth } } }).to_string()
    };
    text(with_config(&name, &auth(USER), folder.path()));
    let other = with_config(&name, &auth("other"), folder.path());
    assert!(line(&other).contains("not for you"));
    let broken = with_config(&name, "{", folder.path());
    assert!(line(&broken).contains("config.json: EOF while parsing"));
    // A helper that knows this registry and no other.
    let helper = folder.path().join("docker-credential-test");
    let script = format!(
        "#!/bin/sh\n\
         read -r server\n\
         [ \"$1 $server\" = 'get {}' ] || {{ echo credentials not found; exit 1; }}\n\
         echo '{{\"ServerURL\":\"x\",\"Username\":\"{USER}\",\"Secret\":\"{PASSWORD}\"}}'\n",
        server.address
    );
    std::fs::write(&helper, script).unwrap();
    std::fs::set_permissions(&helper, std::fs::Permissions::from_mode(0o755)).unwrap();
    for config in [
        json!({ "credsStore": "test" }),
        json!({ "credHelpers": { &server.address: "test" } }),
    ] {
        text(with_config(&name, &config.to_string(), folder.path()));
    }
    let missing = json!({ "credsStore": "no-such" }).to_string();
    let missing = line(&with_config(&name, &missing, folder.path()));
    assert!(missing.contains("docker-credential-no-such: "), "{missing}");
}

/// A server of tokens (distribution's token authentication), whose tokens the key in
/// `folder` signs.
fn token_server(folder: &Path) -> Http {
    let folder = folder.to_owned();
    Http::serve(move |request| {
        let basic = format!("Basic {}", STANDARD.encode(format!("{USER}:{PASSWORD}")));
        let user = request.headers.get("authorization");
        if user.is_some_and(|user| *user != basic) {
            return Answer {
                status: 401,
                ..Answer::default()
            };
        }
        let actions: &[&str] = match user {
            Some(_) => &["pull", "push"],
            // Everybody may pull what is in `open/`.
            None if scope(request).starts_with("repository:open/") => &["pull"],
            None => &[],
        };
        let body = json!({ "token": token(&folder, &scope(request), actions), "expires_in": 300 });
        Answer {
            status: 200,
            body: body.to_string().into_bytes(),
            ..Answer::default()
        }
    })
}

fn scope(request: &Request) -> String {
    let query = request.path.split_once('?').unwrap().1;
    let pairs = query.split('&').filter_map(|pair| pair.split_once('='));
    let (_, scope) = pairs.into_iter().find(|(key, _)| *key == "scope").unwrap();
    scope
        .replace("%3A", ":")
        .replace("%2F", "/")
        .replace("%2C", ",")
}

/// A JSON web token, RS256, that grants these actions of those that are asked for.
fn token(folder: &Path, scope: &str, actions: &[&str]) -> String {
    let (repository, asked) = scope
        .strip_prefix("repository:")
        .unwrap()
        .rsplit_once(':')
        .unwrap();
    let granted: Vec<&str> = asked.split(',').filter(|a| actions.contains(a)).collect();
    let certificate: String = std::fs::read_to_string(folder.join("cert.pem"))
        .unwrap()
        .lines()
        .filter(|line| !line.starts_with("-----"))
        .collect();
    let now = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap()
        .as_secs();
    let head = json!({ "typ": "JWT", "alg": "RS256", "x5c": [certificate] });
    let claims = json!({
        "iss": "test", "sub": USER, "aud": "registry", "jti": "1",
        "nbf": now - 60, "iat": now - 60, "exp": now + 300,
        "access": [{ "type": "repository", "name": repository, "actions": granted }],
    });
    let part = |value: &serde_json::Value| URL_SAFE_NO_PAD.encode(value.to_string());
    let signed = format!("{}.{}", part(&head), part(&claims));
    let mut openssl = Command::new("openssl")
        .args(["dgst", "-sha256", "-sign", "key.pem"])
        .current_dir(folder)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    openssl
        .stdin
        .take()
        .unwrap()
        .write_all(signed.as_bytes())
        .unwrap();
    let signature = openssl.wait_with_output().unwrap().stdout;
    format!("{signed}.{}", URL_SAFE_NO_PAD.encode(signature))
}

#[test]
fn a_token_opens_the_registry() {
    let folder = tempfile::tempdir().unwrap();
    certificate(folder.path(), "DNS:test");
    let tokens = token_server(folder.path());
    let auth = format!(
        "auth: {{ token: {{ realm: 'http://{}/token', service: registry, issuer: test, \
         rootcertbundle: {} }} }}",
        tokens.address,
        folder.path().join("cert.pem").display()
    );
    let server = Server::configured("127.0.0.1:0", "", &auth);
    let open = format!("{}/open/a:1", server.address);
    let closed = format!("{}/closed/a:1", server.address);
    let first = store_with(&open, &layers());
    good(first.path(), &["tag", &open, &closed]);
    for name in [&open, &closed] {
        let refused = vm_run(first.path(), &["push", name]);
        assert!(line(&refused).contains("not for you"));
        text(as_user(first.path(), &["push", name], USER, PASSWORD));
    }
    let root = tempfile::tempdir().unwrap();
    good(root.path(), &["pull", &open]);
    assert!(line(&vm_run(root.path(), &["pull", &closed])).contains("not for you"));
    let wrong = as_user(root.path(), &["pull", &closed], USER, "wrong");
    assert!(line(&wrong).contains("not for you"));
    text(as_user(root.path(), &["pull", &closed], USER, PASSWORD));
}

#[test]
fn tls_is_the_rule_and_checks_who_answers() {
    let folder = tempfile::tempdir().unwrap();
    certificate(folder.path(), "IP:127.0.0.2");
    let pem = |name: &str| folder.path().join(name).display().to_string();
    let tls = format!(
        "  tls: {{ certificate: {}, key: {} }}",
        pem("cert.pem"),
        pem("key.pem")
    );
    let server = Server::configured("127.0.0.2:0", &tls, "");
    let name = format!("{}/a:1", server.address);
    let first = store_with(&name, &layers());
    let trusting = |root: &Path, args: &[&str]| {
        command(root, args)
            .env("SSL_CERT_FILE", pem("cert.pem"))
            .output()
            .unwrap()
    };
    text(trusting(first.path(), &["push", &name]));
    let root = tempfile::tempdir().unwrap();
    text(trusting(root.path(), &["pull", &name]));
    let stranger = line(&vm_run(root.path(), &["pull", &name]));
    assert!(stranger.contains("certificate"), "{stranger}");
    // Without TLS there is no answer that could be used.
    line(&vm_run(root.path(), &["pull", "--plain-http", &name]));
}
