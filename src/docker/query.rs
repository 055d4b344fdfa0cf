//! What stands in an address after the question mark.

use crate::engine::Window;
use crate::error::{Error, Result};
use axum::extract::FromRequestParts;
use axum::http::request::Parts;
use serde_json::Value;
use std::collections::{BTreeMap, BTreeSet};
use std::str::FromStr;

/// The parameters of a request.
#[derive(Debug, Default)]
pub(crate) struct Query(BTreeMap<String, String>);

impl<S: Sync> FromRequestParts<S> for Query {
    type Rejection = Error;

    async fn from_request_parts(parts: &mut Parts, _: &S) -> Result<Self> {
        let text = parts.uri.query().unwrap_or_default();
        let pairs = form_urlencoded::parse(text.as_bytes());
        Ok(Self(pairs.into_owned().collect()))
    }
}

impl Query {
    /// What is there and not empty.
    pub(crate) fn get(&self, name: &str) -> Option<&str> {
        let value = self.0.get(name).map(String::as_str);
        value.filter(|value| !value.is_empty())
    }

    /// As docker reads it: everything is true but these.
    pub(crate) fn flag(&self, name: &str) -> bool {
        let value = self.get(name).map(str::to_ascii_lowercase);
        !matches!(value.as_deref(), None | Some("0" | "no" | "false" | "none"))
    }

    /// The same of what is true if nothing is said.
    pub(crate) fn flag_or_true(&self, name: &str) -> bool {
        self.get(name).is_none() || self.flag(name)
    }

    pub(crate) fn number<T: FromStr>(&self, name: &str) -> Result<Option<T>> {
        let bad = || Error::bad_parameter(format!("invalid value for parameter {name}"));
        let value = self.get(name).map(|value| value.parse().map_err(|_| bad()));
        value.transpose()
    }

    /// `h` and `w`.
    pub(crate) fn window(&self) -> Result<Window> {
        match (self.number("h")?, self.number("w")?) {
            (Some(rows), Some(cols)) => Ok(Window { rows, cols }),
            _ => Err(Error::bad_parameter(
                "a size is h=LINES and w=COLUMNS, numbers both",
            )),
        }
    }

    /// `filters`: docker's two forms of it.
    pub(crate) fn filters(&self) -> Result<Filters> {
        let bad = || Error::bad_parameter("invalid filters: they are a JSON object");
        let Some(text) = self.get("filters") else {
            return Ok(Filters::default());
        };
        let parsed: BTreeMap<String, Value> = serde_json::from_str(text).map_err(|_| bad())?;
        let mut filters = BTreeMap::new();
        for (name, values) in parsed {
            let values: BTreeSet<String> = match values {
                Value::Array(values) => values
                    .into_iter()
                    .map(|value| value.as_str().map(str::to_owned).ok_or_else(bad))
                    .collect::<Result<_>>()?,
                Value::Object(values) => values.into_iter().map(|(value, _)| value).collect(),
                _ => return Err(bad()),
            };
            filters.insert(name, values);
        }
        Ok(Filters(filters))
    }
}

/// What of a list is wanted.
#[derive(Debug, Default)]
pub(crate) struct Filters(BTreeMap<String, BTreeSet<String>>);

impl Filters {
    /// # Errors
    /// One that is not known.
    pub(crate) fn check(&self, known: &[&str]) -> Result<()> {
        match self.0.keys().find(|name| !known.contains(&name.as_str())) {
            Some(name) => Err(Error::bad_parameter(format!("invalid filter '{name}'"))),
            None => Ok(()),
        }
    }

    pub(crate) fn has(&self, name: &str) -> bool {
        self.0.contains_key(name)
    }

    /// Whether there is no such filter, or one of its values fits.
    pub(crate) fn any(&self, name: &str, fits: impl Fn(&str) -> bool) -> bool {
        let values = self.0.get(name);
        values.is_none_or(|values| values.iter().any(|value| fits(value)))
    }

    /// Whether all values fit.
    pub(crate) fn all(&self, name: &str, fits: impl Fn(&str) -> bool) -> bool {
        let values = self.0.get(name);
        values.is_none_or(|values| values.iter().all(|value| fits(value)))
    }
}

/// Whether `NAME` or `NAME=VALUE` is among labels.
pub(crate) fn has_label<'a>(wanted: &str, get: impl FnOnce(&str) -> Option<&'a String>) -> bool {
    match wanted.split_once('=') {
        None => get(wanted).is_some(),
        Some((name, value)) => get(name).is_some_and(|found| found == value),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn query(text: &str) -> Query {
        Query(
            form_urlencoded::parse(text.as_bytes())
                .into_owned()
                .collect(),
        )
    }

    #[test]
    fn flags_are_read_as_docker_reads_them() {
        for text in ["x=1", "x=true", "x=True", "x=yes", "x=7"] {
            assert!(query(text).flag("x"), "{text}");
        }
        for text in ["", "x=", "x=0", "x=false", "x=no", "x=None"] {
            assert!(!query(text).flag("x"), "{text}");
        }
        assert!(query("").flag_or_true("x") && !query("x=0").flag_or_true("x"));
        assert!(query("n=x").number::<u32>("n").is_err());
    }

    #[test]
    fn filters_have_two_forms() {
        for text in [
            r#"filters={"label":["a","b=c"]}"#,
            r#"filters={"label":{"a":true,"b=c":true}}"#,
        ] {
            let filters = query(text).filters().expect("filters");
            assert!(filters.check(&["label"]).is_ok() && filters.check(&["name"]).is_err());
            assert!(filters.any("label", |value| value == "a"));
            assert!(!filters.all("label", |value| value == "a"));
            assert!(filters.all("name", |_| false), "without a filter all fits");
        }
        for text in [
            "filters=x",
            "filters=[]",
            r#"filters={"a":[1]}"#,
            r#"filters={"a":1}"#,
        ] {
            assert!(query(text).filters().is_err(), "{text}");
        }
    }
}
