//! Images, as docker's API has them.

use super::sessions::thread;
use crate::image::error::ImageError;
use crate::image::{self, Access, Login, Store};
use crate::progress::{Bars, Quiet};
use anyhow::{Context, Result};
use base64::Engine as _;
use base64::alphabet::URL_SAFE;
use base64::engine::{DecodePaddingMode, GeneralPurpose, GeneralPurposeConfig};
use docker_api::Error;
use docker_api::models::{ImageDeleteResponseItem, ImageSummary};
use serde::Deserialize;
use serde_json::{Value, json};
use std::collections::HashMap;
use std::path::Path;
use tokio::sync::mpsc;

/// What of a pull's progress waits for a client.
const STEPS: usize = 64;

/// Docker's numbers for what the store says.
pub fn refused(error: ImageError) -> Error {
    match &error {
        // Docker's client pulls an image that it is told is not there by these words.
        ImageError::NoSuchImage(name) => Error::not_found(format!("No such image: {name}")),
        ImageError::BadName { .. } | ImageError::Ambiguous(_) => {
            Error::bad_parameter(error.to_string())
        }
        _ => Error::failed(error.to_string()),
    }
}

/// All of them.
pub fn list(store: &Store) -> Result<Vec<ImageSummary>, Error> {
    let all = store.list().map_err(refused)?.into_iter();
    let summary = |image: image::ImageSummary| {
        let created = image.created.as_deref().and_then(|time| time.parse().ok());
        let created = created.map_or(0, jiff::Timestamp::as_second);
        let labels = store.inspect(&image.id).map_err(refused)?["Config"]["Labels"].take();
        let labels: HashMap<String, String> = serde_json::from_value(labels).unwrap_or_default();
        Ok(ImageSummary {
            id: image.id,
            repo_tags: image.names,
            repo_digests: image.digests,
            created,
            size: i64::try_from(image.size).unwrap_or(i64::MAX),
            // Docker's words for what was not counted.
            shared_size: -1,
            containers: -1,
            labels,
            ..ImageSummary::default()
        })
    };
    all.map(summary).collect()
}

/// What a removal did.
pub fn remove(store: &Store, image: &str) -> Result<Vec<ImageDeleteResponseItem>, Error> {
    let removed = store.remove(image).map_err(refused)?;
    let untagged = removed
        .untagged
        .into_iter()
        .map(|name| ImageDeleteResponseItem {
            untagged: Some(name),
            deleted: None,
        });
    let deleted = removed
        .deleted
        .into_iter()
        .map(|id| ImageDeleteResponseItem {
            untagged: None,
            deleted: Some(id),
        });
    Ok(untagged.chain(deleted).collect())
}

/// Pulls, in a thread of its own, and tells how it goes.
pub fn pull(root: &Path, image: &str, auth: Option<&str>) -> Result<mpsc::Receiver<Value>, Error> {
    let reference = image::Reference::parse(image).map_err(refused)?;
    let login = auth.map(login).transpose()?.flatten();
    let store = Store::open(root).map_err(refused)?;
    let (tell, told) = mpsc::channel(STEPS);
    let image = image.to_owned();
    let pulling = move || {
        let access = Access {
            login,
            ..Access::default()
        };
        let status = |status: String| {
            // The client may have gone: what was begun is done.
            tell.blocking_send(json!({ "status": status })).ok();
        };
        status(format!("Pulling from {}", reference.name.path()));
        match image::pull(&store, &reference, &access, (&Bars::hidden(), &Quiet)) {
            Ok(pulled) => {
                let news = match pulled.is_known {
                    true => "Image is up to date",
                    false => "Downloaded newer image",
                };
                status(format!("Digest: {}", pulled.digest));
                status(format!("Status: {news} for {image}"));
            }
            Err(error) => {
                let error = error.to_string();
                let last = json!({ "errorDetail": { "message": error }, "error": error });
                tell.blocking_send(last).ok();
            }
        }
    };
    thread("pull", pulling).map_err(|error| Error::failed(format!("{error:#}")))?;
    Ok(told)
}

/// Docker's header: JSON in the web's base64, with or without its end.
fn login(header: &str) -> Result<Option<Login>, Error> {
    #[derive(Deserialize)]
    #[serde(default)]
    #[derive(Default)]
    struct Auth {
        username: String,
        password: String,
    }
    let config =
        GeneralPurposeConfig::new().with_decode_padding_mode(DecodePaddingMode::Indifferent);
    let decoded = GeneralPurpose::new(&URL_SAFE, config).decode(header);
    let parsed = decoded
        .context("no base64")
        .and_then(|bytes| Ok(serde_json::from_slice::<Auth>(&bytes)?));
    let auth = parsed
        .map_err(|error| Error::bad_parameter(format!("invalid X-Registry-Auth: {error}")))?;
    let is_somebody = !auth.username.is_empty();
    Ok(is_somebody.then_some(Login {
        user: auth.username,
        password: auth.password,
    }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_login_is_read_from_the_header() {
        // {"username":"u","password":"p?>","serveraddress":"x"}
        let header = "eyJ1c2VybmFtZSI6InUiLCJwYXNzd29yZCI6InA_PiIsInNlcnZlcmFkZHJlc3MiOiJ4In0=";
        for header in [header, header.trim_end_matches('=')] {
            let login = login(header).expect("a login").expect("somebody");
            assert_eq!((login.user.as_str(), login.password.as_str()), ("u", "p?>"));
        }
        assert_eq!(login("e30=").expect("nobody"), None);
        for bad in ["%", "eyJ1", "WzFd"] {
            assert!(login(bad).is_err(), "{bad}");
        }
    }
}
