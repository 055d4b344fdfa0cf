//! Why something cannot be done with a container, a network or a volume as it is: for
//! faces that tell that by a number.

/// It is not there, or not in the state that it would have to be in.
#[derive(Debug, thiserror::Error)]
#[error("{message}")]
pub struct Unfit {
    message: String,
    is_missing: bool,
}

impl Unfit {
    /// There is none.
    pub fn missing(message: impl Into<String>) -> Self {
        Self {
            message: message.into(),
            is_missing: true,
        }
    }

    /// It, or another one, is in the way.
    pub fn conflict(message: impl Into<String>) -> Self {
        Self {
            message: message.into(),
            is_missing: false,
        }
    }

    /// Whether there is none.
    pub fn is_missing(&self) -> bool {
        self.is_missing
    }
}
