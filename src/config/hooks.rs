//! `[hooks]`: which program is run on which occasion, for all groups and for single ones.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::Duration;

use proto::Name;

use super::error::Problem;
use super::parse::{Context, Seen, path};
use super::reader::{Reader, Section, text};
use super::units;

/// Most time a hook may take, unless told otherwise.
const TIMEOUT_DEFAULT: Duration = Duration::from_secs(60);
const TIMEOUT_MIN: Duration = Duration::from_millis(100);
const TIMEOUT_MAX: Duration = Duration::from_secs(3600);

/// A change of who serves a group.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Transition {
    /// The copy becomes the server.
    Failover,
    /// The old primary becomes the server again.
    Failback,
    /// The other side becomes the server, planned.
    Switchover,
    /// The primary's own disk goes back to a point.
    Rollback,
    /// A copy is tried.
    Drill,
}

/// Before or after.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Phase {
    /// Before anything is changed.
    Pre,
    /// After it is done.
    Post,
}

/// A hook's occasion.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Hook {
    /// Of a transition.
    Of(Transition, Phase),
    /// This node learned that its group is fenced.
    Fenced,
}

impl Hook {
    /// Every hook, with its key in the configuration and its name.
    pub const ALL: [(Self, &'static str, &'static str); 11] = {
        use Phase::{Post, Pre};
        use Transition as T;
        [
            (Self::Of(T::Failover, Pre), "pre_failover", "pre-failover"),
            (Self::Of(T::Failover, Post), "post_failover", "post-failover"),
            (Self::Of(T::Failback, Pre), "pre_failback", "pre-failback"),
            (Self::Of(T::Failback, Post), "post_failback", "post-failback"),
            (Self::Of(T::Switchover, Pre), "pre_switchover", "pre-switchover"),
            (Self::Of(T::Switchover, Post), "post_switchover", "post-switchover"),
            (Self::Of(T::Rollback, Pre), "pre_rollback", "pre-rollback"),
            (Self::Of(T::Rollback, Post), "post_rollback", "post-rollback"),
            (Self::Of(T::Drill, Pre), "pre_drill", "pre-drill"),
            (Self::Of(T::Drill, Post), "post_drill", "post-drill"),
            (Self::Fenced, "fenced", "fenced"),
        ]
    };

    /// As `TWINSITE_HOOK` and messages have it.
    #[must_use]
    pub fn name(self) -> &'static str {
        Self::ALL.iter().find(|(hook, ..)| *hook == self).map_or("hook", |(.., name)| name)
    }
}

/// `[hooks]`.
#[derive(Clone, Debug)]
pub struct HooksConfig {
    /// Most time a hook may take.
    pub timeout: Duration,
    /// For every group.
    hooks: BTreeMap<Hook, PathBuf>,
    /// `[[hooks.group]]`: instead of those above, by `GROUP` or `CLIENT/GROUP`.
    groups: Vec<(String, BTreeMap<Hook, PathBuf>)>,
}

impl Default for HooksConfig {
    fn default() -> Self {
        Self { timeout: TIMEOUT_DEFAULT, hooks: BTreeMap::new(), groups: Vec::new() }
    }
}

impl HooksConfig {
    /// The program for an occasion of a group.
    #[must_use]
    pub fn find(&self, hook: Hook, client: Option<&Name>, group: &Name) -> Option<&PathBuf> {
        let full = client.map(|client| format!("{client}/{group}"));
        let names = |given: &str| full.as_deref() == Some(given) || group.as_str() == given;
        let own = self.groups.iter().filter(|(given, _)| names(given)).find_map(|(_, hooks)| hooks.get(&hook));
        own.or_else(|| self.hooks.get(&hook))
    }

    /// Every program.
    pub fn all(&self) -> impl Iterator<Item = (Hook, &PathBuf)> {
        let of_groups = self.groups.iter().flat_map(|(_, hooks)| hooks);
        self.hooks.iter().chain(of_groups).map(|(hook, path)| (*hook, path))
    }
}

pub(super) fn hooks<'d>(reader: &mut Reader<'d>, mut section: Section<'d>, context: &mut Context) -> HooksConfig {
    let s = &mut section;
    let timeout = reader.get(s, "timeout", text("\"60s\"", units::duration));
    if let Some(found) = &timeout
        && !(TIMEOUT_MIN..=TIMEOUT_MAX).contains(&found.value)
    {
        reader.wrong(found, Problem::Range { min: "\"100ms\"", max: "\"1h\"" });
    }
    let hooks = programs(reader, s, context);
    let sections = reader.sections(s, "group", "[[hooks.group]]");
    let groups = sections.into_iter().filter_map(|section| group(reader, section, context)).collect();
    reader.finish(section);
    HooksConfig { timeout: timeout.map_or(TIMEOUT_DEFAULT, |found| found.value), hooks, groups }
}

fn programs<'d>(reader: &mut Reader<'d>, section: &mut Section<'d>, context: &Context) -> BTreeMap<Hook, PathBuf> {
    let one = |(hook, key, _): (Hook, &'static str, _)| {
        let found = reader.get(section, key, text("a path in quotes", |t| path(context, t)))?;
        Some((hook, found.value))
    };
    Hook::ALL.into_iter().filter_map(one).collect()
}

fn group<'d>(
    reader: &mut Reader<'d>,
    mut section: Section<'d>,
    context: &mut Context,
) -> Option<(String, BTreeMap<Hook, PathBuf>)> {
    let s = &mut section;
    let name = reader.need(s, "name", "\"db\"", text("\"db\" or \"alpha/db\"", selector));
    if let Some(found) = &name {
        let seen: &mut Seen = &mut context.seen;
        seen.once(reader, format!("hooks of {}", found.value), found, "put all hooks of a group into one section");
    }
    let hooks = programs(reader, s, context);
    reader.finish(section);
    Some((name?.value, hooks))
}

fn selector(given: &str) -> Result<String, Problem> {
    for part in given.splitn(2, '/') {
        part.parse::<Name>()?;
    }
    Ok(given.to_owned())
}
