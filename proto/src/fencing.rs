//! Who may write: the rules by which a receiver admits a primary. Pure, and exhaustive over its inputs.

use crate::units::Generation;

/// What a group at the receiver is doing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum GroupRole {
    /// Following a primary.
    Replica,
    /// Promoted: a fork of it is the running server.
    Active,
}

/// The receiver's answer to a primary's claim.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Admission {
    /// Go on, in this generation.
    Admit {
        /// The generation of every epoch of this session.
        generation: Generation,
    },
    /// Another side may write now; the primary must stop replicating.
    Fenced {
        /// The generation that holds.
        generation: Generation,
    },
    /// The primary claims a generation that the receiver never heard of: a foreign or damaged store.
    Ahead {
        /// The receiver's generation.
        ours: Generation,
        /// The primary's claim.
        theirs: Generation,
    },
}

/// Decides on a primary that claims `theirs` (zero: it has no record of any) at a receiver that stands at `ours` (zero: the
/// group is new) in `role`.
#[must_use]
pub fn admit(ours: Generation, role: GroupRole, theirs: Generation) -> Admission {
    match (role, ours.0, theirs.0) {
        (GroupRole::Active, _, _) => Admission::Fenced { generation: ours },
        (GroupRole::Replica, 0, 0) => Admission::Admit { generation: Generation(1) },
        // The receiver lost or never had the group: it starts from nothing in the primary's generation.
        (GroupRole::Replica, 0, _) => Admission::Admit { generation: theirs },
        // The primary lost its record: nobody else was promoted, so it is still the writer; everything is compared or sent.
        (GroupRole::Replica, _, 0) => Admission::Admit { generation: ours },
        (GroupRole::Replica, o, t) if o == t => Admission::Admit { generation: ours },
        (GroupRole::Replica, o, t) if t < o => Admission::Fenced { generation: ours },
        (GroupRole::Replica, _, _) => Admission::Ahead { ours, theirs },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Every combination of small generations: no older claim is admitted, nothing is admitted once promoted.
    #[test]
    fn an_old_generation_is_never_admitted() {
        for ours in 0..5 {
            for theirs in 0..5 {
                for role in [GroupRole::Replica, GroupRole::Active] {
                    let answer = admit(Generation(ours), role, Generation(theirs));
                    match answer {
                        Admission::Admit { generation } => {
                            assert_eq!(role, GroupRole::Replica);
                            assert!(generation.0 >= 1 && generation.0 >= ours && (theirs == 0 || generation.0 == theirs));
                        }
                        Admission::Fenced { generation } => assert_eq!(generation.0, ours),
                        Admission::Ahead { .. } => assert!(theirs > ours && ours > 0),
                    }
                }
            }
        }
    }
}
