//! The control socket: HTTP and JSON. Translates requests to calls of the [`Node`] and nothing else.

use std::sync::Arc;

use axum::extract::rejection::{JsonRejection, QueryRejection};
use axum::extract::{Query, State};
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use axum::{Json, Router};
use proto::Point;
use serde::Deserialize;

use super::exports::ExportError;
use super::{Node, RequestError};
use crate::api::{
    ApiError, FailoverDone, FailoverPlan, FailoverRequest, NameRequest, Named, NodeId, NodeStatus, Points, Verification,
    VerifyRequest,
};

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct GroupQuery {
    group: String,
    point: Option<Point>,
}

/// All routes.
pub(crate) fn router(node: Arc<Node>) -> Router {
    Router::new()
        .route("/v1/id", get(id))
        .route("/v1/status", get(status))
        .route("/v1/points", get(points))
        .route("/v1/names", post(name))
        .route("/v1/failover", get(plan).post(failover))
        .route("/v1/verify", get(verification).post(verify))
        .fallback(async || (StatusCode::NOT_FOUND, answer("no such path; this node speaks /v1".to_owned())))
        .with_state(node)
}

fn answer(error: String) -> Json<ApiError> {
    Json(ApiError { error })
}

impl IntoResponse for RequestError {
    fn into_response(self) -> Response {
        let status = match &self {
            Self::NoReceiver
            | Self::UnknownGroup { .. }
            | Self::AmbiguousGroup { .. }
            | Self::UnknownPoint { .. }
            | Self::UnknownName { .. }
            | Self::UnknownPrimary { .. }
            | Self::CopyOnly { .. }
            | Self::NeverVerified { .. } => StatusCode::NOT_FOUND,
            Self::NoPoint { .. }
            | Self::Name(_)
            | Self::AlreadyActive { .. }
            | Self::NotRunning { .. }
            | Self::Verify(_)
            | Self::Exports(ExportError::NameTaken { .. }) => StatusCode::CONFLICT,
            Self::Export { .. } | Self::Query(_) | Self::Body(_) => StatusCode::BAD_REQUEST,
            Self::Exports(_) | Self::Record(_) | Self::Receiver(_) | Self::Aborted => StatusCode::INTERNAL_SERVER_ERROR,
        };
        (status, answer(self.to_string())).into_response()
    }
}

async fn id(State(node): State<Arc<Node>>) -> Json<NodeId> {
    Json(node.id.clone())
}

async fn status(State(node): State<Arc<Node>>) -> Json<NodeStatus> {
    Json(node.status().await)
}

async fn points(
    State(node): State<Arc<Node>>,
    query: Result<Query<GroupQuery>, QueryRejection>,
) -> Result<Json<Points>, RequestError> {
    let Query(query) = query?;
    Ok(Json(node.points(&query.group).await?))
}

async fn name(
    State(node): State<Arc<Node>>,
    body: Result<Json<NameRequest>, JsonRejection>,
) -> Result<Json<Named>, RequestError> {
    let Json(request) = body?;
    let copies = node.receiving()?;
    Ok(Json(copies.name(&copies.find(&request.group).await?, &request).await?))
}

async fn plan(
    State(node): State<Arc<Node>>,
    query: Result<Query<GroupQuery>, QueryRejection>,
) -> Result<Json<FailoverPlan>, RequestError> {
    let Query(query) = query?;
    Ok(Json(node.failover_plan(&query.group, query.point).await?))
}

async fn verification(
    State(node): State<Arc<Node>>,
    query: Result<Query<GroupQuery>, QueryRejection>,
) -> Result<Json<Verification>, RequestError> {
    let Query(query) = query?;
    Ok(Json(node.verification(&query.group).await?))
}

async fn verify(
    State(node): State<Arc<Node>>,
    body: Result<Json<VerifyRequest>, JsonRejection>,
) -> Result<Json<Verification>, RequestError> {
    let Json(request) = body?;
    Ok(Json(node.verify(&request.group).await?))
}

async fn failover(
    State(node): State<Arc<Node>>,
    body: Result<Json<FailoverRequest>, JsonRejection>,
) -> Result<Json<FailoverDone>, RequestError> {
    let Json(request) = body?;
    // A task of its own: a command line that goes away must not stop a failover half way.
    let running = tokio::spawn(async move { node.failover(&request).await });
    Ok(Json(running.await.map_err(|_| RequestError::Aborted)??))
}
