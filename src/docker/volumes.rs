//! `/volumes`.

use crate::engine::Engine;
use crate::error::{Error, Result};
use crate::networks::has_labels;
use crate::query::Query;
use crate::routes::{App, Given, body};
use axum::Json;
use axum::extract::{Path, State};
use axum::http::StatusCode;
use bollard_stubs::models::VolumeCreateRequest;
use serde_json::{Value, json};

pub(crate) async fn list<E: Engine>(
    State(app): State<App<E>>,
    query: Query,
) -> Result<Json<Value>> {
    let filters = query.filters()?;
    filters.check(&["driver", "label", "name"])?;
    let mut found = app.call(E::volumes).await?;
    found.retain(|volume| {
        let text = |name: &str| volume[name].as_str().unwrap_or_default().to_owned();
        filters.any("name", |wanted| text("Name").contains(wanted))
            && filters.any("driver", |wanted| text("Driver") == wanted)
            && has_labels(volume, &filters)
    });
    Ok(Json(json!({ "Volumes": found, "Warnings": [] })))
}

pub(crate) async fn inspect<E: Engine>(
    State(app): State<App<E>>,
    Path(name): Path<String>,
) -> Result<Json<Value>> {
    app.call(move |engine| engine.volume(&name)).await.map(Json)
}

pub(crate) async fn create<E: Engine>(
    State(app): State<App<E>>,
    given: Given<VolumeCreateRequest>,
) -> Result<(StatusCode, Json<Value>)> {
    let given = body(given)?;
    let driver = given.driver.as_deref().unwrap_or_default();
    if !matches!(driver, "" | "local") {
        return Err(Error::not_supported(format!(
            "vm-run does not support the volume driver {driver:?}"
        )));
    }
    if given.driver_opts.is_some_and(|options| !options.is_empty()) {
        return Err(Error::not_supported(
            "vm-run does not support options of volume drivers",
        ));
    }
    if given.labels.is_some_and(|labels| !labels.is_empty()) {
        return Err(Error::not_supported(
            "vm-run does not support labels of volumes",
        ));
    }
    let name = given.name.filter(|name| !name.is_empty());
    let made = app.call(move |engine| engine.volume_create(name)).await?;
    Ok((StatusCode::CREATED, Json(made)))
}

pub(crate) async fn remove<E: Engine>(
    State(app): State<App<E>>,
    Path(name): Path<String>,
    query: Query,
) -> Result<StatusCode> {
    let force = query.flag("force");
    app.call(move |engine| engine.volume_remove(&name, force))
        .await?;
    Ok(StatusCode::NO_CONTENT)
}
