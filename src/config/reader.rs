//! Reads a TOML document key by key, remembers which keys exist, and collects everything that is wrong instead of stopping at
//! the first. Knows nothing of what the keys mean.
//!
//! serde's own messages cannot name the section, the value and the remedy in one line, nor report more than one
//! mistake, hence this.

use std::path::{Path, PathBuf};

use toml::Spanned;
use toml::de::{DeTable, DeValue};

use super::error::{ConfigError, Place, Problem};

/// Longest value that a message repeats, in characters.
const SHOWN_CHARS_MAX: usize = 80;
/// A key further away than this many edits is no likely slip of the pen.
const NEAREST_EDITS_MAX: usize = 3;

/// The document's text and the errors so far.
pub(super) struct Reader<'d> {
    file: PathBuf,
    text: &'d str,
    pub(super) errors: Vec<ConfigError>,
}

/// A section and the keys that were asked for.
pub(super) struct Section<'d> {
    pub(super) title: String,
    pub(super) at: usize,
    table: &'d DeTable<'d>,
    known: Vec<&'static str>,
}

/// A value, its key and where it is.
#[derive(Clone, Debug)]
pub(super) struct Found<T> {
    pub(super) value: T,
    pub(super) at: usize,
    pub(super) key: &'static str,
    pub(super) text: String,
}

impl<'d> Reader<'d> {
    pub(super) fn new(file: &Path, text: &'d str) -> Self {
        Self { file: file.to_path_buf(), text, errors: Vec::new() }
    }

    /// The line of a byte offset.
    pub(super) fn line(&self, at: usize) -> usize {
        1 + self.text.as_bytes().iter().take(at).filter(|b| **b == b'\n').count()
    }

    pub(super) fn place(&self, at: usize) -> Place {
        Place { file: self.file.clone(), line: self.line(at) }
    }

    pub(super) fn syntax(&mut self, error: &toml::de::Error) {
        let place = self.place(error.span().map_or(0, |s| s.start));
        let message = error.message().replace('\n', "; ");
        self.errors.push(ConfigError::Syntax { place, message });
    }

    pub(super) fn wrong<T>(&mut self, found: &Found<T>, problem: Problem) {
        let place = self.place(found.at);
        self.errors.push(ConfigError::Value { place, key: found.key.to_owned(), value: found.text.clone(), problem });
    }

    fn raw(&self, span: std::ops::Range<usize>) -> String {
        let text = self.text.get(span).unwrap_or_default();
        let first = text.lines().next().unwrap_or_default();
        let shown: String = first.chars().take(SHOWN_CHARS_MAX).filter(|c| !c.is_control()).collect();
        if shown.len() < text.len() { format!("{shown}…") } else { shown }
    }

    /// Takes `key` if it is there and `parse` likes it.
    pub(super) fn get<T>(
        &mut self,
        section: &mut Section<'d>,
        key: &'static str,
        parse: impl FnOnce(&DeValue<'d>) -> Result<T, Problem>,
    ) -> Option<Found<T>> {
        section.known.push(key);
        let value = section.table.get(key)?;
        let found = Found { value: (), at: value.span().start, key, text: self.raw(value.span()) };
        match parse(value.get_ref()) {
            Ok(value) => Some(Found { value, at: found.at, key, text: found.text }),
            Err(problem) => {
                self.wrong(&found, problem);
                None
            }
        }
    }

    /// As [`get`](Self::get), for a key that must be there.
    pub(super) fn need<T>(
        &mut self,
        section: &mut Section<'d>,
        key: &'static str,
        example: &'static str,
        parse: impl FnOnce(&DeValue<'d>) -> Result<T, Problem>,
    ) -> Option<Found<T>> {
        if !section.table.contains_key(key) {
            section.known.push(key);
            let place = self.place(section.at);
            self.errors.push(ConfigError::Missing { place, table: section.title.clone(), key, example });
            return None;
        }
        self.get(section, key, parse)
    }

    /// The section `[key]` or inline table, if it is there.
    pub(super) fn section(&mut self, parent: &mut Section<'d>, key: &'static str, title: &str) -> Option<Section<'d>> {
        parent.known.push(key);
        let value = parent.table.get(key)?;
        match value.get_ref() {
            DeValue::Table(table) => {
                Some(Section { title: title.to_owned(), at: self.start(parent, key), table, known: Vec::new() })
            }
            other => {
                let found = Found { value: (), at: value.span().start, key, text: self.raw(value.span()) };
                self.wrong(&found, wrong_type(other, "a section", "its keys on lines below […], or { key = value, … }"));
                None
            }
        }
    }

    /// The sections `[[key]]`, in order.
    pub(super) fn sections(&mut self, parent: &mut Section<'d>, key: &'static str, title: &str) -> Vec<Section<'d>> {
        parent.known.push(key);
        let Some(value) = parent.table.get(key) else { return Vec::new() };
        let mut all = Vec::new();
        let entries: &'d [Spanned<DeValue<'d>>] = match value.get_ref() {
            DeValue::Array(entries) => entries,
            _ => &[],
        };
        for entry in entries {
            if let DeValue::Table(table) = entry.get_ref() {
                all.push(Section { title: title.to_owned(), at: entry.span().start, table, known: Vec::new() });
            }
        }
        if all.is_empty() || all.len() != entries.len() {
            let found = Found { value: (), at: self.start(parent, key), key, text: self.raw(value.span()) };
            self.wrong(&found, wrong_type(value.get_ref(), "a list of sections", "[[…]] on a line of its own, once for each"));
        }
        all
    }

    /// Where `key` is written.
    fn start(&self, parent: &Section<'d>, key: &str) -> usize {
        parent.table.get_key_value(key).map_or(parent.at, |(k, _)| k.span().start)
    }

    /// Reports every key that nobody asked for.
    pub(super) fn finish(&mut self, section: Section<'d>) {
        for key in section.table.keys() {
            let name = key.get_ref().as_ref();
            if !section.known.contains(&name) {
                self.errors.push(ConfigError::UnknownKey {
                    place: self.place(key.span().start),
                    key: one_line(name),
                    table: section.title.clone(),
                    nearest: nearest(name, &section.known),
                    known: section.known.clone(),
                });
            }
        }
    }
}

impl<'d> Section<'d> {
    pub(super) fn root(table: &'d DeTable<'d>) -> Self {
        Self { title: "the file".to_owned(), at: 0, table, known: Vec::new() }
    }

    /// A string of this section, if there is one, for titles.
    pub(super) fn peek(&self, key: &str) -> Option<&str> {
        self.table.get(key).and_then(|v| v.get_ref().as_str())
    }
}

/// As it can be written in the file: a quoted key may have any character in it.
fn one_line(key: &str) -> String {
    let shown = key.chars().take(SHOWN_CHARS_MAX);
    shown.map(|c| if c.is_control() { c.escape_default().to_string() } else { c.to_string() }).collect()
}

fn wrong_type(value: &DeValue<'_>, wanted: &'static str, example: &'static str) -> Problem {
    let found = match value {
        DeValue::String(_) => "a string",
        DeValue::Integer(_) => "a whole number",
        DeValue::Float(_) => "a fraction",
        DeValue::Boolean(_) => "true or false",
        DeValue::Datetime(_) => "a date",
        DeValue::Array(_) => "a list",
        DeValue::Table(_) => "a section",
    };
    Problem::Type { found, wanted, example }
}

/// A string, handed on to `parse`.
pub(super) fn text<'d, T>(
    example: &'static str,
    parse: impl FnOnce(&str) -> Result<T, Problem>,
) -> impl FnOnce(&DeValue<'d>) -> Result<T, Problem> {
    move |value| match value {
        DeValue::String(s) => parse(s),
        other => Err(wrong_type(other, "a string", example)),
    }
}

/// `true` or `false`.
pub(super) fn flag(value: &DeValue<'_>) -> Result<bool, Problem> {
    value.as_bool().ok_or_else(|| wrong_type(value, "true or false", "true or false without quotes"))
}

/// A whole number within `min..=max`; the two texts are for the message.
pub(super) fn number<'d>(
    (min, max): (u64, u64),
    (min_text, max_text): (&'static str, &'static str),
) -> impl FnOnce(&DeValue<'d>) -> Result<u64, Problem> {
    move |value| {
        let DeValue::Integer(n) = value else { return Err(wrong_type(value, "a whole number", "a number without quotes")) };
        u64::from_str_radix(n.as_str(), n.radix())
            .ok()
            .filter(|n| (min..=max).contains(n))
            .ok_or(Problem::Range { min: min_text, max: max_text })
    }
}

/// A list of strings, each handed to `parse`.
pub(super) fn list<'d, T>(
    example: &'static str,
    parse: impl Fn(&str) -> Result<T, Problem>,
) -> impl FnOnce(&DeValue<'d>) -> Result<Vec<T>, Problem> {
    move |value| {
        let Some(entries) = value.as_array() else { return Err(wrong_type(value, "a list", example)) };
        entries
            .iter()
            .map(|entry| match entry.get_ref() {
                DeValue::String(s) => parse(s),
                other => Err(wrong_type(other, "a string", example)),
            })
            .collect()
    }
}

/// The word of `known` that `given` was probably meant to be.
pub(crate) fn nearest<'k>(given: &str, known: &[&'k str]) -> Option<&'k str> {
    known
        .iter()
        .map(|k| (edits(given, k), *k))
        .filter(|(d, k)| *d <= NEAREST_EDITS_MAX && *d * 2 <= k.len().max(2))
        .min_by_key(|(d, _)| *d)
        .map(|(_, k)| k)
}

/// Levenshtein's distance, by rows.
fn edits(a: &str, b: &str) -> usize {
    let b: Vec<char> = b.chars().collect();
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, x) in a.chars().take(SHOWN_CHARS_MAX).enumerate() {
        let mut diagonal = i;
        let mut left = i + 1;
        for (cell, y) in row.iter_mut().skip(1).zip(&b) {
            let cost = diagonal + usize::from(x != *y);
            diagonal = *cell;
            *cell = cost.min(left + 1).min(diagonal + 1);
            left = *cell;
        }
        if let Some(first) = row.first_mut() {
            *first = i + 1;
        }
    }
    row.last().copied().unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_nearest_key_is_near() {
        let known = ["interval", "peer", "peer_key", "codec", "epochs_in_flight"];
        assert_eq!(nearest("intervall", &known), Some("interval"));
        assert_eq!(nearest("peerkey", &known), Some("peer_key"));
        assert_eq!(nearest("epoch_in_flight", &known), Some("epochs_in_flight"));
        assert_eq!(nearest("colour", &known), None);
        assert_eq!(edits("kitten", "sitting"), 3);
        assert_eq!(edits("", "abc"), 3);
    }
}
