//! Registries: the protocol of the OCI distribution specification, by `oci-client`.
//!
//! ```text
//! credentials who the user is: docker's config.json and its helpers
//! download    one layer: streamed to disk, hashed, cut and gone on with
//! pull        manifest -> configuration -> layers -> store
//! push        store -> layers -> configuration -> manifest
//! ```
//!
//! A registry is a stranger, and so is whoever sits on the way to one that is reached
//! without TLS: documents are bounded before they are in memory, layers by what the
//! manifest says of them, and nothing is taken whose digest is not the expected one.
//! The asynchronous runtime lives as long as one call: [`pull`] and [`push`] block.

mod credentials;
mod download;
mod pull;
mod push;

pub use credentials::Login;
pub use pull::pull;
pub use push::push;

use super::digest::{Hasher, hex};
use super::error::{Context, ImageError, Result, printable};
use super::name::Name;
use oci_client::client::{ClientConfig, ClientProtocol};
use oci_client::errors::{OciDistributionError, OciErrorCode};
use oci_client::manifest::{
    IMAGE_MANIFEST_LIST_MEDIA_TYPE, IMAGE_MANIFEST_MEDIA_TYPE, OCI_IMAGE_INDEX_MEDIA_TYPE,
    OCI_IMAGE_MEDIA_TYPE,
};
use oci_client::secrets::RegistryAuth;
use oci_client::{Client, Reference, RegistryOperation};
use reqwest::StatusCode;
use reqwest::header::ACCEPT;
use std::error::Error;
use std::time::Duration;

/// How long a connection may take to come up, and how long nothing may come over one.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(30);
const READ_TIMEOUT: Duration = Duration::from_secs(60);
/// How long all of a login may take: its answers are small.
const LOGIN_TIMEOUT: Duration = Duration::from_secs(60);
/// How often what failed on the way is tried, and the wait before the second time,
/// which doubles from then on. docker tries five times too.
const ATTEMPTS: u32 = 5;
const FIRST_WAIT: Duration = Duration::from_millis(250);
/// Layers that are on their way at once, as in docker.
const AT_ONCE: usize = 3;

/// The hosts that are reached without TLS, as by docker.
const LOOPBACK: [&str; 2] = ["localhost", "127.0.0.1"];

const USER_AGENT: &str = concat!("vm-run/", env!("CARGO_PKG_VERSION"));
const DOCUMENTS: [&str; 4] = [
    OCI_IMAGE_MEDIA_TYPE,
    OCI_IMAGE_INDEX_MEDIA_TYPE,
    IMAGE_MANIFEST_MEDIA_TYPE,
    IMAGE_MANIFEST_LIST_MEDIA_TYPE,
];

/// With these a registry says that an image is not there, or not for this user; which
/// of them it says differs from one to the other.
const UNSEEN: [OciErrorCode; 5] = [
    OciErrorCode::Denied,
    OciErrorCode::ManifestUnknown,
    OciErrorCode::NameUnknown,
    OciErrorCode::NotFound,
    OciErrorCode::Unauthorized,
];

/// How a registry is to be reached.
#[derive(Clone, Debug, Default)]
pub struct Access {
    /// Without TLS. `localhost` and 127.0.0.1 are reached so in any case.
    pub plain_http: bool,
    /// Who asks; `None` for what docker's config.json says.
    pub login: Option<Login>,
}

/// A repository of a registry, with the user logged in.
struct Repository {
    client: Client,
    /// For documents, which `oci-client` would take into memory whatever their size.
    http: reqwest::Client,
    reference: Reference,
    base: String,
    auth: RegistryAuth,
    /// Of the login, for the documents, which are the first things asked for.
    token: Option<String>,
    /// The registry's host and port, for messages.
    host: String,
}

/// Runs a future to its end on this thread.
fn block_on<T>(future: impl Future<Output = Result<T>>) -> Result<T> {
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .context(|| "start the network's event loop".to_owned())?
        .block_on(future)
}

impl Repository {
    /// Logs in to the registry of `name`. It is tried once: a registry that is not
    /// there at the beginning has a wrong name as a rule.
    async fn open(name: &Name, access: &Access, operation: RegistryOperation) -> Result<Self> {
        let reference = Reference::with_tag(
            name.domain().to_owned(),
            name.path().to_owned(),
            name.tag().to_owned(),
        );
        let host = reference.resolve_registry().to_owned();
        let loopback = is_loopback(&host);
        let plain = access.plain_http || loopback;
        let login = match &access.login {
            Some(login) => Some(login.clone()),
            None => credentials::find(name.domain())?,
        };
        let auth = login.map_or(RegistryAuth::Anonymous, |login| {
            RegistryAuth::Basic(login.user, login.password)
        });
        let mut repository = Repository {
            client: client(plain, loopback).map_err(|error| network(&host, &error))?,
            http: http_client(loopback).map_err(|error| network(&host, &error))?,
            base: format!(
                "{}://{host}/v2/{}",
                if plain { "http" } else { "https" },
                reference.repository()
            ),
            reference,
            auth,
            token: None,
            host,
        };
        repository.token = repository.log_in(operation).await?;
        Ok(repository)
    }

    /// Returns a token if the registry gives one. `oci-client` keeps it, and renews it.
    async fn log_in(&self, operation: RegistryOperation) -> Result<Option<String>> {
        let answer = self.client.auth(&self.reference, &self.auth, operation);
        match tokio::time::timeout(LOGIN_TIMEOUT, answer).await {
            Ok(answer) => answer.map_err(|error| self.failure(error)),
            Err(_) => Err(self.busy("the login took too long")),
        }
    }

    /// A manifest or an index by its tag or its digest, at most `most` bytes of it,
    /// and its digest.
    async fn document(&self, tag_or_digest: &str, most: u64) -> Result<(Vec<u8>, String)> {
        let url = format!("{}/manifests/{tag_or_digest}", self.base);
        let request = self.http.get(url).header(ACCEPT, DOCUMENTS.join(", "));
        let request = match (&self.token, &self.auth) {
            (Some(token), _) => request.bearer_auth(token),
            (None, RegistryAuth::Basic(user, password)) => request.basic_auth(user, Some(password)),
            (None, _) => request,
        };
        let lost = |error: reqwest::Error| network(&self.host, &error);
        let mut answer = request.send().await.map_err(lost)?;
        let status = answer.status();
        let declared = answer
            .headers()
            .get("Docker-Content-Digest")
            .and_then(|value| value.to_str().ok())
            .map(str::to_owned);
        let mut bytes = Vec::new();
        while let Some(chunk) = answer.chunk().await.map_err(lost)? {
            if bytes.len() as u64 + chunk.len() as u64 > most {
                return Err(ImageError::Limit(format!(
                    "the manifest has more than {most} bytes"
                )));
            }
            bytes.extend_from_slice(&chunk);
        }
        if status != StatusCode::OK {
            return Err(self.refusal(status, &String::from_utf8_lossy(&bytes)));
        }
        let found = Hasher::digest(&bytes);
        // A tag's digest is only the registry's word, which at least must fit.
        for expected in [Some(tag_or_digest.to_owned()), declared].iter().flatten() {
            if hex(expected).is_ok() {
                Hasher::check("the manifest", expected, &found)?;
            }
        }
        Ok((bytes, found))
    }

    /// What a failed request means. [`ImageError::Network`] is worth another try.
    fn failure(&self, error: OciDistributionError) -> ImageError {
        match error {
            OciDistributionError::RequestError(error) => match error.status() {
                Some(status) => self.refusal(status, &error.to_string()),
                None => network(&self.host, &error),
            },
            OciDistributionError::IoError(error) => network(&self.host, &error),
            OciDistributionError::ServerError { code, message, .. } => {
                let status = StatusCode::from_u16(code);
                self.refusal(status.unwrap_or(StatusCode::BAD_GATEWAY), &message)
            }
            OciDistributionError::UnauthorizedError { .. }
            | OciDistributionError::AuthenticationFailure(_) => self.denied(),
            OciDistributionError::RegistryError { envelope, .. } => {
                let said = |codes: &[OciErrorCode]| {
                    envelope
                        .errors
                        .iter()
                        .any(|error| codes.contains(&error.code))
                };
                if said(&UNSEEN) {
                    self.denied()
                } else if said(&[OciErrorCode::Toomanyrequests]) {
                    self.busy(&envelope.to_string())
                } else {
                    self.registry_says(&envelope.to_string())
                }
            }
            other => self.registry_says(&other.to_string()),
        }
    }

    /// What a status that is no success means.
    fn refusal(&self, status: StatusCode, body: &str) -> ImageError {
        match status {
            StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN | StatusCode::NOT_FOUND => {
                self.denied()
            }
            status if status.is_server_error() || status == StatusCode::TOO_MANY_REQUESTS => {
                self.busy(&format!("{status}: {body}"))
            }
            status => self.registry_says(&format!("{status}: {body}")),
        }
    }

    fn busy(&self, reason: &str) -> ImageError {
        ImageError::Network {
            registry: self.host.clone(),
            reason: printable(reason.as_bytes()),
        }
    }

    fn denied(&self) -> ImageError {
        ImageError::Denied {
            registry: self.host.clone(),
        }
    }

    fn registry_says(&self, reason: &str) -> ImageError {
        ImageError::Registry {
            registry: self.host.clone(),
            reason: printable(reason.as_bytes()),
        }
    }
}

/// Tries what the network may break, with longer and longer waits.
async fn persist<T>(mut attempt: impl AsyncFnMut() -> Result<T>) -> Result<T> {
    let mut wait = FIRST_WAIT;
    for _ in 1..ATTEMPTS {
        match attempt().await {
            Err(ImageError::Network { registry, reason }) => {
                log::info!("{registry}: {reason}; trying again");
            }
            other => return other,
        }
        tokio::time::sleep(wait).await;
        wait *= 2;
    }
    attempt().await
}

/// What the network, or the TLS on it, says.
fn network(host: &str, error: &(dyn Error + 'static)) -> ImageError {
    // The outer errors of an HTTP client say little; the innermost is the system's.
    let mut innermost = error;
    while let Some(inner) = inner(innermost) {
        innermost = inner;
    }
    let registry = host.to_owned();
    let reason = printable(innermost.to_string().as_bytes());
    // A certificate does not become better by trying again.
    match innermost.downcast_ref() {
        Some(rustls::Error::InvalidCertificate(_)) => ImageError::Registry { registry, reason },
        _ => ImageError::Network { registry, reason },
    }
}

/// The cause of an error. That of an I/O error that was made from another is the other
/// one, which `source` passes over.
fn inner<'a>(error: &'a (dyn Error + 'static)) -> Option<&'a (dyn Error + 'static)> {
    let made_from = error
        .downcast_ref::<std::io::Error>()
        .and_then(std::io::Error::get_ref);
    match made_from {
        Some(inner) => Some(inner),
        None => error.source(),
    }
}

fn is_loopback(host: &str) -> bool {
    let name = host.rsplit_once(':').map_or(host, |(name, _)| name);
    LOOPBACK.contains(&name)
}

fn client(plain: bool, loopback: bool) -> Result<Client, OciDistributionError> {
    // The first one stays, which is this one as well.
    drop(rustls::crypto::ring::default_provider().install_default());
    let mut config = ClientConfig {
        protocol: if plain {
            ClientProtocol::Http
        } else {
            ClientProtocol::Https
        },
        use_monolithic_push: true,
        connect_timeout: Some(CONNECT_TIMEOUT),
        read_timeout: Some(READ_TIMEOUT),
        user_agent: USER_AGENT,
        ..ClientConfig::default()
    };
    if loopback {
        // A proxy of its own, which is used for other hosts, keeps it from the one that
        // the environment names: that one could not reach this loopback.
        config.http_proxy = Some("http://localhost".to_owned());
        config.no_proxy = Some(LOOPBACK.join(","));
    }
    Client::try_from(config)
}

fn http_client(loopback: bool) -> reqwest::Result<reqwest::Client> {
    let builder = reqwest::Client::builder()
        .user_agent(USER_AGENT)
        .connect_timeout(CONNECT_TIMEOUT)
        .read_timeout(READ_TIMEOUT);
    if loopback {
        builder.no_proxy().build()
    } else {
        builder.build()
    }
}

#[cfg(test)]
mod tests {
    use super::is_loopback;

    #[test]
    fn only_this_machine_is_reached_without_tls() {
        for host in ["localhost", "localhost:5000", "127.0.0.1:80"] {
            assert!(is_loopback(host), "{host}");
        }
        for host in ["localhost.example", "127.0.0.2:5000", "example.com:80"] {
            assert!(!is_loopback(host), "{host}");
        }
    }
}
