//! The whole table: which address is which call.

use crate::engine::Engine;
use crate::error::{Error, Result};
use crate::{containers, execs, images, networks, system, volumes};
use axum::Router;
use axum::extract::DefaultBodyLimit;
use axum::extract::rejection::JsonRejection;
use axum::http::Method;
use axum::routing::{delete, get, post};
use std::sync::Arc;

/// The longest body that is not a stream, in bytes: room for the longest command line and
/// environment that Linux takes.
const BODY_MAX: usize = 16 << 20;

/// What every call has.
pub(crate) struct App<E>(Arc<E>);

impl<E> Clone for App<E> {
    fn clone(&self) -> Self {
        Self(Arc::clone(&self.0))
    }
}

impl<E: Engine> App<E> {
    /// Makes a call of the engine's, on a thread that may block.
    pub(crate) async fn call<T: Send + 'static>(
        self,
        call: impl FnOnce(&E) -> Result<T> + Send + 'static,
    ) -> Result<T> {
        match tokio::task::spawn_blocking(move || call(&self.0)).await {
            Ok(done) => done,
            Err(error) => Err(Error::failed(format!("this is a bug: {error}"))),
        }
    }
}

pub(crate) fn routes<E: Engine>(engine: Arc<E>) -> Router {
    Router::new()
        .route("/_ping", get(system::ping).head(system::ping))
        .route("/version", get(system::version::<E>))
        .route("/info", get(system::info::<E>))
        .route("/containers/json", get(containers::list::<E>))
        .route("/containers/create", post(containers::create::<E>))
        .route("/containers/{id}/json", get(containers::inspect::<E>))
        .route("/containers/{id}/start", post(containers::start::<E>))
        .route("/containers/{id}/stop", post(containers::stop::<E>))
        .route("/containers/{id}/restart", post(containers::restart::<E>))
        .route("/containers/{id}/kill", post(containers::kill::<E>))
        .route("/containers/{id}/pause", post(containers::pause::<E>))
        .route("/containers/{id}/unpause", post(containers::unpause::<E>))
        .route("/containers/{id}/rename", post(containers::rename::<E>))
        .route("/containers/{id}/wait", post(containers::wait::<E>))
        .route("/containers/{id}/attach", post(containers::attach::<E>))
        .route("/containers/{id}/resize", post(containers::resize::<E>))
        .route("/containers/{id}/logs", get(containers::logs::<E>))
        .route("/containers/{id}/top", get(containers::top::<E>))
        .route("/containers/{id}/stats", get(containers::stats::<E>))
        .route("/containers/{id}/changes", get(containers::changes::<E>))
        .route("/containers/{id}", delete(containers::remove::<E>))
        .route("/containers/{id}/exec", post(execs::create::<E>))
        .route("/exec/{id}/start", post(execs::start::<E>))
        .route("/exec/{id}/resize", post(execs::resize::<E>))
        .route("/exec/{id}/json", get(execs::inspect::<E>))
        .route("/images/json", get(images::list::<E>))
        .route("/images/create", post(images::create::<E>))
        .route("/networks", get(networks::list::<E>))
        .route("/networks/create", post(networks::create::<E>))
        .route(
            "/networks/{id}",
            get(networks::inspect::<E>).delete(networks::remove::<E>),
        )
        .route("/networks/{id}/connect", post(networks::connect::<E>))
        .route("/networks/{id}/disconnect", post(networks::disconnect::<E>))
        .route("/volumes", get(volumes::list::<E>))
        .route("/volumes/create", post(volumes::create::<E>))
        .route(
            "/volumes/{name}",
            get(volumes::inspect::<E>).delete(volumes::remove::<E>),
        )
        // A name has slashes.
        .route(
            "/images/{*rest}",
            get(images::get::<E>)
                .post(images::post::<E>)
                .delete(images::remove::<E>),
        )
        .fallback(unknown)
        .method_not_allowed_fallback(unknown)
        .layer(DefaultBodyLimit::max(BODY_MAX))
        .with_state(App(engine))
}

/// What docker has and is in no table of ours, and what nobody has.
async fn unknown(method: Method, uri: axum::http::Uri) -> Error {
    /// First parts of docker's addresses.
    const DOCKERS: [&str; 20] = [
        "auth",
        "build",
        "commit",
        "configs",
        "containers",
        "distribution",
        "events",
        "exec",
        "grpc",
        "images",
        "networks",
        "nodes",
        "plugins",
        "secrets",
        "services",
        "session",
        "swarm",
        "system",
        "tasks",
        "volumes",
    ];
    let first = uri.path().split('/').nth(1).unwrap_or_default();
    match DOCKERS.contains(&first) {
        true => unsupported(&method, uri.path()),
        false => Error::not_found("page not found"),
    }
}

/// In the words by which docker's client knows it.
pub(crate) fn unsupported(method: &Method, path: &str) -> Error {
    Error::not_supported(format!("{method} {path} is not supported by vm-run"))
}

/// A body that was sent, if it can be read.
pub(crate) type Given<T> = std::result::Result<axum::Json<T>, JsonRejection>;

/// A body that is no JSON, or not of the form, in one line.
pub(crate) fn body<T>(given: Given<T>) -> Result<T> {
    given
        .map(|axum::Json(body)| body)
        .map_err(|error| Error::bad_parameter(error.body_text().replace('\n', " ")))
}
