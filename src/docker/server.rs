//! Connections: as many as there may be, each with its own patience, until it is told to
//! end.

use crate::engine::Engine;
use crate::routes::routes;
use crate::version::{self, API_VERSION};
use axum::Router;
use axum::body::Body;
use axum::extract::Request;
use axum::http::HeaderValue;
use axum::response::{IntoResponse, Response};
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper_util::rt::{TokioIo, TokioTimer};
use std::convert::Infallible;
use std::future::Future;
use std::sync::Arc;
use std::time::Duration;
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, watch};
use tower_service::Service;

/// What clients may take.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// Connections at once; more wait until one has gone.
    pub connections: usize,
    /// How long the head of a request may take.
    pub head: Duration,
    /// How long what is under way may go on at the end.
    pub shutdown: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            connections: 1024,
            head: Duration::from_secs(30),
            shutdown: Duration::from_secs(10),
        }
    }
}

/// A connection's place among the [`Limits`], for as long as anybody has it: a session
/// keeps it when its request has been answered.
#[derive(Clone)]
pub(crate) struct Seat(#[expect(dead_code, reason = "held")] Arc<OwnedSemaphorePermit>);

/// How long after a failure to accept: there may be no descriptors for a while.
const PAUSE: Duration = Duration::from_millis(100);

/// Serves until `ends`; then no connection is taken any more, and those that are there end
/// with their request, or after a while.
pub async fn serve<E: Engine>(
    listener: UnixListener,
    engine: Arc<E>,
    limits: Limits,
    ends: impl Future<Output = ()> + Send,
) {
    let app = routes(engine);
    let room = Arc::new(Semaphore::new(limits.connections));
    let (ending, ended) = watch::channel(());
    let mut ends = std::pin::pin!(ends);
    loop {
        let next = async {
            let permit = Arc::clone(&room).acquire_owned().await.ok()?;
            Some((permit, listener.accept().await))
        };
        let next = tokio::select! {
            next = next => next,
            () = &mut ends => break,
        };
        match next {
            Some((permit, Ok((stream, _)))) => {
                tokio::spawn(connection(
                    stream,
                    app.clone(),
                    limits,
                    ended.clone(),
                    permit,
                ));
            }
            Some((_, Err(error))) => {
                log::warn!("a client cannot be taken: {error}");
                tokio::time::sleep(PAUSE).await;
            }
            None => break,
        }
    }
    drop((listener, ending));
    let all = u32::try_from(limits.connections).unwrap_or(u32::MAX);
    if tokio::time::timeout(limits.shutdown, room.acquire_many(all))
        .await
        .is_err()
    {
        log::info!("clients that are still there are left");
    }
}

async fn connection(
    stream: UnixStream,
    app: Router,
    limits: Limits,
    mut ended: watch::Receiver<()>,
    permit: OwnedSemaphorePermit,
) {
    let seat = Seat(Arc::new(permit));
    let service = hyper::service::service_fn(move |mut request: hyper::Request<Incoming>| {
        let app = app.clone();
        request.extensions_mut().insert(seat.clone());
        async move { Ok::<_, Infallible>(answer(app, request.map(Body::new)).await) }
    });
    let mut served = std::pin::pin!(
        http1::Builder::new()
            .timer(TokioTimer::new())
            .header_read_timeout(limits.head)
            .serve_connection(TokioIo::new(stream), service)
            .with_upgrades()
    );
    let done = tokio::select! {
        done = served.as_mut() => done,
        // The sender is gone: nothing is ever sent.
        _ = ended.changed() => {
            served.as_mut().graceful_shutdown();
            served.await
        }
    };
    if let Err(error) = done {
        log::debug!("a client: {error}");
    }
}

/// With what every answer of docker's says.
async fn answer(mut app: Router, mut request: Request) -> Response {
    let mut response = match version::take(&mut request) {
        Err(error) => error.into_response(),
        // A router is always ready, and never fails.
        Ok(()) => match app.call(request).await {
            Ok(response) => response,
            Err(never) => match never {},
        },
    };
    let headers = response.headers_mut();
    for (name, value) in [
        ("api-version", API_VERSION),
        ("docker-experimental", "false"),
        ("ostype", "linux"),
        (
            "server",
            concat!("vm-run/", env!("CARGO_PKG_VERSION"), " (linux)"),
        ),
        ("swarm", "inactive"),
    ] {
        headers.insert(name, HeaderValue::from_static(value));
    }
    response
}
