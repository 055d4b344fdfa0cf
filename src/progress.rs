//! Progress of long operations, for people: a bar on a terminal, silence in a pipe.

use indicatif::{MultiProgress, ProgressBar, ProgressDrawTarget, ProgressStyle};
use std::cell::RefCell;

/// Is told how far a long operation has come. One step at a time.
pub trait Progress {
    /// A step begins. `total` is its size in bytes, if known.
    fn begin(&self, label: &str, total: Option<u64>);
    /// `bytes` more of the step are done.
    fn advance(&self, bytes: u64);
    /// The step is over.
    fn end(&self);
}

/// Shows nothing.
pub struct Quiet;

impl Progress for Quiet {
    fn begin(&self, _label: &str, _total: Option<u64>) {}
    fn advance(&self, _bytes: u64) {}
    fn end(&self) {}
}

/// A bar on standard error if that is a terminal, nothing otherwise.
#[derive(Default)]
pub struct Bar {
    current: RefCell<Option<ProgressBar>>,
}

impl Progress for Bar {
    fn begin(&self, label: &str, total: Option<u64>) {
        let bar = ProgressBar::with_draw_target(total, ProgressDrawTarget::stderr());
        self.current.replace(Some(dressed(bar, label)));
    }

    fn advance(&self, bytes: u64) {
        if let Some(bar) = &*self.current.borrow() {
            bar.inc(bytes);
        }
    }

    fn end(&self) {
        if let Some(bar) = self.current.take() {
            bar.finish_and_clear();
        }
    }
}

/// Bars of steps that run side by side, under the same rule.
pub struct Bars(MultiProgress);

/// One of them. Dropping it takes it off the screen.
pub struct Line(ProgressBar);

impl Bars {
    /// Shown on standard error if that is a terminal.
    pub fn shown() -> Bars {
        Bars(MultiProgress::with_draw_target(ProgressDrawTarget::stderr()))
    }

    /// Shown nowhere.
    pub fn hidden() -> Bars {
        Bars(MultiProgress::with_draw_target(ProgressDrawTarget::hidden()))
    }

    /// A step of `total` bytes begins.
    pub fn begin(&self, label: &str, total: u64) -> Line {
        Line(dressed(self.0.add(ProgressBar::new(total)), label))
    }
}

impl Line {
    /// So many bytes of the step are done.
    pub fn reached(&self, bytes: u64) {
        self.0.set_position(bytes);
    }
}

impl Drop for Line {
    fn drop(&mut self) {
        self.0.finish_and_clear();
    }
}

fn dressed(bar: ProgressBar, label: &str) -> ProgressBar {
    let template = match bar.length() {
        Some(_) => "{msg:28!} {wide_bar} {binary_bytes}/{binary_total_bytes}",
        None => "{msg:28!} {spinner} {binary_bytes}",
    };
    if let Ok(style) = ProgressStyle::with_template(template) {
        bar.set_style(style);
    }
    bar.set_message(label.to_owned());
    bar
}

impl Drop for Bar {
    fn drop(&mut self) {
        // An error in the middle of a step must not leave half a bar before its message.
        self.end();
    }
}
