//! `/images`.

use crate::engine::Engine;
use crate::error::{Error, Result};
use crate::query::{Query, has_label};
use crate::routes::{App, unsupported};
use crate::session;
use axum::Json;
use axum::extract::{Path, State};
use axum::http::{HeaderMap, Method, StatusCode};
use axum::response::{IntoResponse, Response};
use bollard_stubs::models::{ImageDeleteResponseItem, ImageSummary};

/// How a client says who it is to a registry.
const AUTH: &str = "x-registry-auth";

pub(crate) async fn list<E: Engine>(
    State(app): State<App<E>>,
    query: Query,
) -> Result<Json<Vec<ImageSummary>>> {
    let filters = query.filters()?;
    filters.check(&["dangling", "label", "reference"])?;
    let mut found = app.call(E::images).await?;
    found.retain(|image| {
        let repository = |name: &str| {
            name.rsplit_once(':')
                .map_or(name, |(name, _)| name)
                .to_owned()
        };
        let is_named = |wanted: &str| {
            let mut names = image.repo_tags.iter();
            names.any(|name| name == wanted || repository(name) == wanted)
        };
        filters.any("reference", is_named)
            && filters.any("dangling", |wanted| {
                (wanted == "true" || wanted == "1") == image.repo_tags.is_empty()
            })
            && filters.all("label", |wanted| {
                has_label(wanted, |name| image.labels.get(name))
            })
    });
    Ok(Json(found))
}

/// A pull, in spite of its name.
pub(crate) async fn create<E: Engine>(
    State(app): State<App<E>>,
    query: Query,
    headers: HeaderMap,
) -> Result<Response> {
    if query.get("fromSrc").is_some() {
        return Err(Error::not_supported(
            "vm-run does not support import by this API: use vm-run image import",
        ));
    }
    let image = query.get("fromImage");
    let image = image.ok_or_else(|| Error::bad_parameter("no image is named: fromImage"))?;
    let image = match query.get("tag") {
        Some(digest) if digest.contains(':') => format!("{image}@{digest}"),
        Some(tag) => format!("{image}:{tag}"),
        None => image.to_owned(),
    };
    let auth = headers.get(AUTH).and_then(|auth| auth.to_str().ok());
    let auth = auth.map(str::to_owned);
    let progress = app
        .call(move |engine| engine.pull(&image, auth.as_deref()))
        .await?;
    Ok(session::lines(progress))
}

pub(crate) async fn get<E: Engine>(
    State(app): State<App<E>>,
    Path(rest): Path<String>,
) -> Result<Response> {
    match rest.rsplit_once('/') {
        Some((image, "json")) => {
            let image = image.to_owned();
            let found = app.call(move |engine| engine.image(&image)).await?;
            Ok(Json(found).into_response())
        }
        _ => Err(unsupported(&Method::GET, &format!("/images/{rest}"))),
    }
}

pub(crate) async fn post<E: Engine>(
    State(app): State<App<E>>,
    Path(rest): Path<String>,
    query: Query,
) -> Result<StatusCode> {
    match rest.rsplit_once('/') {
        Some((image, "tag")) => {
            let repository = query.get("repo");
            let repository =
                repository.ok_or_else(|| Error::bad_parameter("no name is given: repo"))?;
            let tag = query.get("tag").unwrap_or("latest");
            let (image, name) = (image.to_owned(), format!("{repository}:{tag}"));
            app.call(move |engine| engine.image_tag(&image, &name))
                .await?;
            Ok(StatusCode::CREATED)
        }
        _ => Err(unsupported(&Method::POST, &format!("/images/{rest}"))),
    }
}

pub(crate) async fn remove<E: Engine>(
    State(app): State<App<E>>,
    Path(image): Path<String>,
    query: Query,
) -> Result<Json<Vec<ImageDeleteResponseItem>>> {
    let force = query.flag("force");
    app.call(move |engine| engine.image_remove(&image, force))
        .await
        .map(Json)
}
