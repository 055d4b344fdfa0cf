//! Which version of the API a client speaks: `/v1.44/containers/json`, or none.

use crate::error::{Error, Result};
use axum::body::Body;
use axum::extract::Request;
use axum::http::Uri;
use axum::http::uri::PathAndQuery;

/// What is spoken.
pub const API_VERSION: &str = "1.47";
/// The oldest that is understood.
pub const API_VERSION_MIN: &str = "1.24";

const NEWEST: (u32, u32) = (1, 47);
const OLDEST: (u32, u32) = (1, 24);

/// The version that a request speaks, by which some answers differ.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Version(u32, u32);

impl Version {
    pub(crate) const fn new(major: u32, minor: u32) -> Self {
        Self(major, minor)
    }
}

/// Takes the version out of the address, where it is of no use any more.
///
/// # Errors
/// One that is not understood, in docker's words.
pub(crate) fn take(request: &mut Request<Body>) -> Result<()> {
    let uri = request.uri();
    let mut version = Version(NEWEST.0, NEWEST.1);
    if let Some((found, rest)) = split(uri.path()) {
        let Version(major, minor) = found;
        if found > Version(NEWEST.0, NEWEST.1) {
            return Err(Error::bad_parameter(format!(
                "client version {major}.{minor} is too new. Maximum supported API version is {API_VERSION}"
            )));
        }
        if found < Version(OLDEST.0, OLDEST.1) {
            return Err(Error::bad_parameter(format!(
                "client version {major}.{minor} is too old. Minimum supported API version is {API_VERSION_MIN}, \
                 please upgrade your client to a newer version"
            )));
        }
        version = found;
        let rest = match uri.query() {
            Some(query) => format!("{rest}?{query}"),
            None => rest.to_owned(),
        };
        let bad = |_| Error::bad_parameter("an address that is none");
        let rest: PathAndQuery = rest.parse().map_err(bad)?;
        *request.uri_mut() = Uri::from(rest);
    }
    request.extensions_mut().insert(version);
    Ok(())
}

/// The version that a path begins with, and the rest of it.
fn split(path: &str) -> Option<(Version, &str)> {
    let (version, rest) = path.strip_prefix("/v")?.split_once('/')?;
    let (major, minor) = version.split_once('.')?;
    let version = Version(major.parse().ok()?, minor.parse().ok()?);
    Some((version, &path[path.len() - rest.len() - 1..]))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_version_is_taken_off_the_path() {
        assert_eq!(
            split("/v1.24/images/a/b/json"),
            Some((Version(1, 24), "/images/a/b/json"))
        );
        for path in [
            "/volumes",
            "/v1/info",
            "/vx.y/info",
            "/v1.2",
            "/",
            "/v1.-2/x",
        ] {
            assert_eq!(split(path), None, "{path}");
        }
    }
}
