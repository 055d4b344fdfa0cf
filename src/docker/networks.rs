//! `/networks`.

use crate::engine::Engine;
use crate::error::Result;
use crate::query::{Filters, Query};
use crate::routes::{App, Given, body};
use axum::Json;
use axum::extract::{Path, State};
use axum::http::StatusCode;
use bollard_stubs::models::{
    NetworkConnectRequest, NetworkCreateRequest, NetworkDisconnectRequest,
};
use serde_json::{Value, json};

pub(crate) async fn list<E: Engine>(
    State(app): State<App<E>>,
    query: Query,
) -> Result<Json<Vec<Value>>> {
    let filters = query.filters()?;
    filters.check(&["driver", "id", "label", "name", "scope", "type"])?;
    let mut found = app.call(E::networks).await?;
    found.retain(|network| {
        let text = |name: &str| network[name].as_str().unwrap_or_default().to_owned();
        let is_custom = text("Name") != "bridge";
        filters.any("name", |wanted| text("Name").contains(wanted))
            && filters.any("id", |wanted| text("Id").starts_with(wanted))
            && filters.any("driver", |wanted| text("Driver") == wanted)
            && filters.any("scope", |wanted| text("Scope") == wanted)
            && filters.any("type", |wanted| (wanted == "custom") == is_custom)
            && has_labels(network, &filters)
    });
    Ok(Json(found))
}

/// Whether docker's object has the labels that are asked for.
pub(crate) fn has_labels(object: &Value, filters: &Filters) -> bool {
    filters.all("label", |wanted| match wanted.split_once('=') {
        None => object["Labels"].get(wanted).is_some(),
        Some((name, value)) => object["Labels"][name] == value,
    })
}

pub(crate) async fn inspect<E: Engine>(
    State(app): State<App<E>>,
    Path(id): Path<String>,
) -> Result<Json<Value>> {
    app.call(move |engine| engine.network(&id)).await.map(Json)
}

pub(crate) async fn create<E: Engine>(
    State(app): State<App<E>>,
    given: Given<NetworkCreateRequest>,
) -> Result<(StatusCode, Json<Value>)> {
    let given = body(given)?;
    let id = app.call(move |engine| engine.network_create(given)).await?;
    Ok((
        StatusCode::CREATED,
        Json(json!({ "Id": id, "Warning": "" })),
    ))
}

pub(crate) async fn remove<E: Engine>(
    State(app): State<App<E>>,
    Path(id): Path<String>,
) -> Result<StatusCode> {
    app.call(move |engine| engine.network_remove(&id)).await?;
    Ok(StatusCode::NO_CONTENT)
}

pub(crate) async fn connect<E: Engine>(
    State(app): State<App<E>>,
    Path(id): Path<String>,
    given: Given<NetworkConnectRequest>,
) -> Result<StatusCode> {
    let given = body(given)?;
    app.call(move |engine| engine.network_connect(&id, given))
        .await?;
    Ok(StatusCode::OK)
}

pub(crate) async fn disconnect<E: Engine>(
    State(app): State<App<E>>,
    Path(id): Path<String>,
    given: Given<NetworkDisconnectRequest>,
) -> Result<StatusCode> {
    let given = body(given)?;
    app.call(move |engine| engine.network_disconnect(&id, given))
        .await?;
    Ok(StatusCode::OK)
}
