//! Progress of long operations, for people: a bar on a terminal, silence in a pipe.

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
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
        let template = match total {
            Some(_) => "{msg:28!} {wide_bar} {binary_bytes}/{binary_total_bytes}",
            None => "{msg:28!} {spinner} {binary_bytes}",
        };
        if let Ok(style) = ProgressStyle::with_template(template) {
            bar.set_style(style);
        }
        bar.set_message(label.to_owned());
        self.current.replace(Some(bar));
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

impl Drop for Bar {
    fn drop(&mut self) {
        // An error in the middle of a step must not leave half a bar before its message.
        self.end();
    }
}
