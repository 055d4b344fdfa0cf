//! `/exec`: one more process in a container.

use crate::engine::{Engine, Window};
use crate::error::{Error, Result};
use crate::query::Query;
use crate::routes::{App, Given, body};
use crate::session::{self, Wanted};
use crate::version::Version;
use axum::body::Bytes;
use axum::extract::{FromRequest, Path, Request, State};
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use axum::{Extension, Json};
use bollard_stubs::models::{ExecConfig, ExecInspectResponse, ExecStartConfig};
use serde_json::{Value, json};

pub(crate) async fn create<E: Engine>(
    State(app): State<App<E>>,
    Path(id): Path<String>,
    given: Given<ExecConfig>,
) -> Result<(StatusCode, Json<Value>)> {
    let given = body(given)?;
    if given.cmd.as_deref().unwrap_or_default().is_empty() {
        return Err(Error::bad_parameter("No exec command specified"));
    }
    let made = app
        .call(move |engine| engine.exec_create(&id, given))
        .await?;
    Ok((StatusCode::CREATED, Json(json!({ "Id": made }))))
}

/// The request's body is read before the connection is taken over.
pub(crate) async fn start<E: Engine>(
    State(app): State<App<E>>,
    Extension(version): Extension<Version>,
    Path(id): Path<String>,
    request: Request,
) -> Result<Response> {
    let (parts, given) = request.into_parts();
    let bytes = Bytes::from_request(Request::new(given), &()).await;
    let bytes = bytes.map_err(|error| Error::bad_parameter(error.body_text()))?;
    let given: ExecStartConfig = match bytes.is_empty() {
        true => ExecStartConfig::default(),
        false => serde_json::from_slice(&bytes)
            .map_err(|error| Error::bad_parameter(format!("invalid JSON: {error}")))?,
    };
    let detach = given.detach.unwrap_or_default();
    let window = given.console_size.as_deref().and_then(window_of);
    let started = app
        .call(move |engine| engine.exec_start(&id, detach, window))
        .await?;
    let Some(session) = started else {
        return Ok(StatusCode::OK.into_response());
    };
    let all = Wanted {
        stdout: true,
        stderr: true,
    };
    let request = Request::from_parts(parts, axum::body::Body::empty());
    Ok(session::answer(request, version, session, all, None))
}

fn window_of(size: &[usize]) -> Option<Window> {
    let &[rows, cols] = size else {
        return None;
    };
    let rows = u16::try_from(rows).ok().filter(|rows| *rows > 0)?;
    let cols = u16::try_from(cols).ok().filter(|cols| *cols > 0)?;
    Some(Window { rows, cols })
}

pub(crate) async fn resize<E: Engine>(
    State(app): State<App<E>>,
    Path(id): Path<String>,
    query: Query,
) -> Result<StatusCode> {
    let window = query.window()?;
    app.call(move |engine| engine.exec_resize(&id, window))
        .await?;
    Ok(StatusCode::OK)
}

pub(crate) async fn inspect<E: Engine>(
    State(app): State<App<E>>,
    Path(id): Path<String>,
) -> Result<Json<ExecInspectResponse>> {
    app.call(move |engine| engine.exec_inspect(&id))
        .await
        .map(Json)
}
