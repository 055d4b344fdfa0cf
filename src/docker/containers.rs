//! `/containers`.

use crate::engine::{Condition, Engine, Exit, LogsOf, Stop};
use crate::error::{Error, Result};
use crate::query::{Filters, Query, has_label};
use crate::routes::{App, Given, body};
use crate::session::{self, Wanted};
use crate::version::Version;
use axum::body::Body;
use axum::extract::{Path, Request, State};
use axum::http::StatusCode;
use axum::http::header::CONTENT_TYPE;
use axum::response::{IntoResponse, Response};
use axum::{Extension, Json};
use bollard_stubs::models::{
    ContainerCreateBody, ContainerCreateResponse, ContainerSummary, ContainerTopResponse,
    FilesystemChange,
};
use futures_util::{StreamExt, stream};
use serde_json::{Value, json};
use std::convert::Infallible;
use std::pin::pin;
use std::time::Duration;

/// How often what a container costs is told.
const STATS: Duration = Duration::from_secs(1);

/// What a list can be asked by.
const FILTERS: [&str; 9] = [
    "ancestor", "exited", "health", "id", "label", "name", "network", "status", "volume",
];

pub(crate) async fn list<E: Engine>(
    State(app): State<App<E>>,
    query: Query,
) -> Result<Json<Vec<ContainerSummary>>> {
    let filters = query.filters()?;
    filters.check(&FILTERS)?;
    let limit = query.number::<i64>("limit")?.filter(|limit| *limit > 0);
    let all = query.flag("all") || limit.is_some() || filters.has("status");
    let mut found = app.call(E::containers).await?;
    found.retain(|one| (all || is_live(one)) && fits(one, &filters));
    found.truncate(limit.map_or(usize::MAX, |limit| limit as usize));
    Ok(Json(found))
}

/// A container's state in docker's word.
fn state_of(one: &ContainerSummary) -> String {
    one.state.map(|state| state.to_string()).unwrap_or_default()
}

fn is_live(one: &ContainerSummary) -> bool {
    matches!(state_of(one).as_str(), "running" | "paused" | "restarting")
}

fn fits(one: &ContainerSummary, filters: &Filters) -> bool {
    let text = |text: &Option<String>| text.clone().unwrap_or_default();
    let (id, status) = (text(&one.id), text(&one.status));
    let names = one.names.as_deref().unwrap_or_default();
    let labels = one.labels.as_ref();
    let mounts = one.mounts.as_deref().unwrap_or_default();
    let networks = one.network_settings.as_ref();
    let networks = networks.and_then(|settings| settings.networks.as_ref());
    filters.any("id", |wanted| id.starts_with(wanted))
        && filters.any("name", |wanted| {
            let wanted = wanted.trim_start_matches('/');
            names.iter().any(|name| name.contains(wanted))
        })
        && filters.any("status", |wanted| state_of(one) == wanted)
        && filters.any("exited", |code| {
            status.starts_with(&format!("Exited ({code})"))
        })
        && filters.any("health", |health| status.ends_with(&format!("({health})")))
        && filters.any("ancestor", |image| {
            let names = [text(&one.image), text(&one.image_id)];
            let tagged = format!("{image}:latest");
            names.iter().any(|name| {
                name == image || *name == tagged || name.ends_with(&format!(":{image}"))
            })
        })
        && filters.any("network", |wanted| {
            networks.is_some_and(|all| all.contains_key(wanted))
        })
        && filters.any("volume", |wanted| {
            mounts.iter().any(|mount| {
                let is = |text: &Option<String>| text.as_deref() == Some(wanted);
                is(&mount.name) || is(&mount.destination)
            })
        })
        && filters.all("label", |wanted| {
            has_label(wanted, |name| labels?.get(name))
        })
}

pub(crate) async fn create<E: Engine>(
    State(app): State<App<E>>,
    query: Query,
    given: Given<ContainerCreateBody>,
) -> Result<(StatusCode, Json<ContainerCreateResponse>)> {
    let given = body(given)?;
    let name = query
        .get("name")
        .map(|name| name.trim_start_matches('/').to_owned());
    let made = app.call(|engine| engine.create(name, given)).await?;
    Ok((StatusCode::CREATED, Json(made)))
}

pub(crate) async fn inspect<E: Engine>(
    State(app): State<App<E>>,
    Path(id): Path<String>,
) -> Result<Json<Value>> {
    app.call(move |engine| engine.inspect(&id)).await.map(Json)
}

/// 304 if there was nothing to do.
fn changed(changed: bool) -> StatusCode {
    match changed {
        true => StatusCode::NO_CONTENT,
        false => StatusCode::NOT_MODIFIED,
    }
}

pub(crate) async fn start<E: Engine>(
    State(app): State<App<E>>,
    Path(id): Path<String>,
) -> Result<StatusCode> {
    app.call(move |engine| engine.start(&id)).await.map(changed)
}

fn how(query: &Query) -> Result<Stop> {
    Ok(Stop {
        signal: query.get("signal").map(str::to_owned),
        timeout: query.number("t")?,
    })
}

pub(crate) async fn stop<E: Engine>(
    State(app): State<App<E>>,
    Path(id): Path<String>,
    query: Query,
) -> Result<StatusCode> {
    let how = how(&query)?;
    app.call(move |engine| engine.stop(&id, &how))
        .await
        .map(changed)
}

pub(crate) async fn restart<E: Engine>(
    State(app): State<App<E>>,
    Path(id): Path<String>,
    query: Query,
) -> Result<StatusCode> {
    let how = how(&query)?;
    app.call(move |engine| engine.restart(&id, &how)).await?;
    Ok(StatusCode::NO_CONTENT)
}

pub(crate) async fn kill<E: Engine>(
    State(app): State<App<E>>,
    Path(id): Path<String>,
    query: Query,
) -> Result<StatusCode> {
    let signal = query.get("signal").map(str::to_owned);
    app.call(move |engine| engine.kill(&id, signal.as_deref()))
        .await?;
    Ok(StatusCode::NO_CONTENT)
}

pub(crate) async fn pause<E: Engine>(
    State(app): State<App<E>>,
    Path(id): Path<String>,
) -> Result<StatusCode> {
    app.call(move |engine| engine.pause(&id)).await?;
    Ok(StatusCode::NO_CONTENT)
}

pub(crate) async fn unpause<E: Engine>(
    State(app): State<App<E>>,
    Path(id): Path<String>,
) -> Result<StatusCode> {
    app.call(move |engine| engine.unpause(&id)).await?;
    Ok(StatusCode::NO_CONTENT)
}

pub(crate) async fn rename<E: Engine>(
    State(app): State<App<E>>,
    Path(id): Path<String>,
    query: Query,
) -> Result<StatusCode> {
    let name = query
        .get("name")
        .map(|name| name.trim_start_matches('/').to_owned());
    let name =
        name.ok_or_else(|| Error::bad_parameter("Neither old nor new names may be empty"))?;
    app.call(move |engine| engine.rename(&id, &name)).await?;
    Ok(StatusCode::NO_CONTENT)
}

pub(crate) async fn remove<E: Engine>(
    State(app): State<App<E>>,
    Path(id): Path<String>,
    query: Query,
) -> Result<StatusCode> {
    let (force, volumes) = (query.flag("force"), query.flag("v"));
    if query.flag("link") {
        return Err(Error::not_supported("vm-run does not support links"));
    }
    app.call(move |engine| engine.remove(&id, force, volumes))
        .await?;
    Ok(StatusCode::NO_CONTENT)
}

/// The headers come at once: a client waits for them before it starts the container whose
/// end it waits for.
pub(crate) async fn wait<E: Engine>(
    State(app): State<App<E>>,
    Path(id): Path<String>,
    query: Query,
) -> Result<Response> {
    let condition = match query.get("condition") {
        None | Some("not-running") => Condition::NotRunning,
        Some("next-exit") => Condition::NextExit,
        Some("removed") => Condition::Removed,
        Some(other) => {
            return Err(Error::bad_parameter(format!(
                "invalid condition: \"{other}\""
            )));
        }
    };
    let waiting = app.call(move |engine| engine.wait(&id, condition)).await?;
    let body = stream::once(async {
        let exit = waiting.await.unwrap_or_else(|_| Exit {
            status: -1,
            error: Some("the engine has given up".into()),
        });
        let error = exit.error.map(|message| json!({ "Message": message }));
        let mut body = json!({ "StatusCode": exit.status });
        if let Some(error) = error {
            body["Error"] = error;
        }
        Ok::<_, Infallible>(format!("{body}\n"))
    });
    let headers = [(CONTENT_TYPE, "application/json")];
    Ok((headers, Body::from_stream(body)).into_response())
}

pub(crate) async fn attach<E: Engine>(
    State(app): State<App<E>>,
    Extension(version): Extension<Version>,
    Path(id): Path<String>,
    query: Query,
    request: Request,
) -> Result<Response> {
    let wanted = Wanted {
        stdout: query.flag("stdout"),
        stderr: query.flag("stderr"),
    };
    let (of, stdin) = (id.clone(), query.flag("stdin"));
    let before = match query.flag("logs") {
        false => None,
        true => {
            let of = LogsOf::default();
            Some(app.clone().call(move |engine| engine.logs(&id, of)).await?)
        }
    };
    if !query.flag("stream") {
        let logs =
            before.ok_or_else(|| Error::bad_parameter("neither stream nor logs is asked for"))?;
        return Ok(session::logs(version, logs, wanted));
    }
    let session = app.call(move |engine| engine.attach(&of, stdin)).await?;
    Ok(session::answer(request, version, session, wanted, before))
}

pub(crate) async fn resize<E: Engine>(
    State(app): State<App<E>>,
    Path(id): Path<String>,
    query: Query,
) -> Result<StatusCode> {
    let window = query.window()?;
    app.call(move |engine| engine.resize(&id, window)).await?;
    Ok(StatusCode::OK)
}

pub(crate) async fn logs<E: Engine>(
    State(app): State<App<E>>,
    Extension(version): Extension<Version>,
    Path(id): Path<String>,
    query: Query,
) -> Result<Response> {
    let wanted = Wanted {
        stdout: query.flag("stdout"),
        stderr: query.flag("stderr"),
    };
    if !wanted.stdout && !wanted.stderr {
        return Err(Error::bad_parameter(
            "Bad parameters: you must choose at least one stream",
        ));
    }
    let tail = match query.get("tail") {
        None | Some("all") => None,
        Some(_) => query.number("tail")?,
    };
    let time = |name| {
        query
            .get(name)
            .filter(|time| *time != "0")
            .map(str::to_owned)
    };
    let of = LogsOf {
        follow: query.flag("follow"),
        timestamps: query.flag("timestamps"),
        tail,
        since: time("since"),
        until: time("until"),
    };
    let logs = app.call(move |engine| engine.logs(&id, of)).await?;
    Ok(session::logs(version, logs, wanted))
}

pub(crate) async fn top<E: Engine>(
    State(app): State<App<E>>,
    Path(id): Path<String>,
) -> Result<Json<ContainerTopResponse>> {
    app.call(move |engine| engine.top(&id)).await.map(Json)
}

pub(crate) async fn changes<E: Engine>(
    State(app): State<App<E>>,
    Path(id): Path<String>,
) -> Result<Json<Vec<FilesystemChange>>> {
    app.call(move |engine| engine.changes(&id)).await.map(Json)
}

/// With what it was before: what a container takes of a processor is the difference.
fn since(before: &Value, mut now: Value) -> Value {
    now["preread"] = before["read"].clone();
    now["precpu_stats"] = before["cpu_stats"].clone();
    now
}

/// Once, or each second until the client or the container has gone.
pub(crate) async fn stats<E: Engine>(
    State(app): State<App<E>>,
    Path(id): Path<String>,
    query: Query,
) -> Result<Response> {
    let of = id.clone();
    let first = app.clone().call(move |engine| engine.stats(&of)).await?;
    let is_stream = query.flag_or_true("stream");
    if !is_stream && query.flag("one-shot") {
        return Ok(Json(first).into_response());
    }
    let later = stream::unfold((app, id, first.clone()), |(app, id, before)| async move {
        tokio::time::sleep(STATS).await;
        let of = id.clone();
        let next = app.clone().call(move |engine| engine.stats(&of)).await;
        let next = since(&before, next.ok()?);
        Some((next.clone(), (app, id, next)))
    });
    if !is_stream {
        // One that has ended meanwhile costs what it has cost.
        let second = pin!(later).next().await;
        return Ok(Json(second.unwrap_or(first)).into_response());
    }
    let all = stream::iter([first]).chain(later);
    let lines = all.map(|value| Ok::<_, Infallible>(format!("{value}\n")));
    let headers = [(CONTENT_TYPE, "application/json")];
    Ok((headers, Body::from_stream(lines)).into_response())
}
