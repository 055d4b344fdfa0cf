//! What the engine is.

use crate::engine::Engine;
use crate::error::Result;
use crate::routes::App;
use axum::Json;
use axum::extract::State;
use axum::http::header::{CACHE_CONTROL, PRAGMA};
use axum::response::IntoResponse;
use bollard_stubs::models::{SystemInfo, SystemVersion};

pub(crate) async fn ping() -> impl IntoResponse {
    let headers = [
        (CACHE_CONTROL, "no-cache, no-store, must-revalidate"),
        (PRAGMA, "no-cache"),
    ];
    (headers, "OK")
}

pub(crate) async fn version<E: Engine>(State(app): State<App<E>>) -> Result<Json<SystemVersion>> {
    app.call(|engine| Ok(engine.version())).await.map(Json)
}

pub(crate) async fn info<E: Engine>(State(app): State<App<E>>) -> Result<Json<SystemInfo>> {
    app.call(E::info).await.map(Json)
}
