//! The blocking library under tokio.
//!
//! ```text
//! cargo run --release --example async_embedding
//! ```
//!
//! It needs `/dev/kvm`, of any kind, and no Linux guest: its template is the guest of a
//! few instructions. With a Linux guest `answer` becomes `start` and `wait`, or `attach`
//! in a warm child, and nothing else changes.
//!
//! The library has no runtime in it and needs none. What it asks of an async program:
//!
//! - each call that waits runs on a thread that may wait: `spawn_blocking`;
//! - a child is owned by one task at a time. `Child` is `Send`, so it moves there;
//! - somebody bounds how many there are: here a semaphore, whose permit lives as long
//!   as the child does;
//! - tokio cannot cancel a blocking call. A child's container is ended from any task by
//!   [`fork::Remote::signal`], and its `wait` then returns.

use anyhow::{Context, Result, ensure};
use fork::{BootSpec, ForkSpec, Host, Template, VMS_PER_PROCESS};
use std::collections::HashSet;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::sync::Semaphore;
use tokio::task::{JoinSet, spawn_blocking};

/// Children in all.
const CHILDREN: usize = 64;
/// Children that live at the same time. A process may hold [`VMS_PER_PROCESS`] VMs;
/// more live in workers, by a [`fork::Pool`].
const AT_ONCE: usize = 8;
const _: () = assert!(AT_ONCE < VMS_PER_PROCESS);

fn main() -> Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .build()
        .context("a runtime")?;
    runtime.block_on(run())
}

async fn run() -> Result<()> {
    let template = spawn_blocking(boot).await??;
    let template = Arc::new(template);
    let permits = Arc::new(Semaphore::new(AT_ONCE));
    let started = Instant::now();
    let mut requests = JoinSet::new();
    for number in 0..CHILDREN {
        let (template, permits) = (Arc::clone(&template), Arc::clone(&permits));
        requests.spawn(async move {
            let permit = permits.acquire_owned().await?;
            spawn_blocking(move || {
                let answer = answer_of_child(&template, number);
                // After the child has ended.
                drop(permit);
                answer
            })
            .await?
        });
    }
    let mut answers = HashSet::new();
    let mut times = Vec::new();
    while let Some(done) = requests.join_next().await {
        let (answer, took) = done??;
        answers.insert(answer);
        times.push(took);
    }
    ensure!(answers.len() == CHILDREN, "two children are the same");
    times.sort_unstable();
    println!(
        "{CHILDREN} children, at most {AT_ONCE} at once, in {:.1} ms; fork to answer: p50 {:.3} ms",
        started.elapsed().as_secs_f64() * 1e3,
        times[CHILDREN / 2].as_secs_f64() * 1e3,
    );
    Ok(())
}

fn boot() -> Result<Template> {
    let host = Arc::new(Host::open()?);
    Ok(Template::boot(host, &BootSpec::default())?)
}

/// One request: a child, its answer, its end. It blocks.
fn answer_of_child(template: &Template, number: usize) -> Result<(u64, Duration)> {
    let asked = Instant::now();
    let mut child = template.fork(ForkSpec {
        hostname: format!("child-{number}"),
        ..ForkSpec::default()
    })?;
    let answer = child.answer()?;
    let took = asked.elapsed();
    ensure!(answer == child.expected_answer(), "a wrong answer");
    child.end();
    Ok((answer, took))
}
